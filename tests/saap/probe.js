// Measures a rendered report and leaves, as JSON in the page, what a reader would stumble over.
(() => {
  const SLACK = 1; // pixels that rounding may cost
  const root = document.documentElement;
  const brief = (element, text) => `${element.tagName.toLowerCase()}: ${text.trim().slice(0, 60)}`;

  const rgba = (colour) => (colour.match(/[\d.]+/g) || []).map(Number);
  const linear = (value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  const luminance = (colour) => {
    const [red, green, blue] = colour.map((value) => linear(value / 255));
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const contrast = (a, b) => {
    const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
    return (high + 0.05) / (low + 0.05); // WCAG 2, "contrast ratio"
  };
  const ancestor = (element, test) => {
    while (element && !test(getComputedStyle(element), element)) element = element.parentElement;
    return element;
  };
  const behind = (element) => {
    const painted = ancestor(element, (style) => rgba(style.backgroundColor)[3] !== 0);
    return painted ? rgba(getComputedStyle(painted).backgroundColor) : [255, 255, 255];
  };
  const scroller = (element) => ancestor(element, (style) => ["auto", "scroll"].includes(style.overflowX));
  const beyond = (box, frame) =>
    box.left < frame.left - SLACK || box.right > frame.right + SLACK;
  const page = { left: 0, right: root.clientWidth };

  const found = {
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    width: root.clientWidth, scrollWidth: root.scrollWidth,
    texts: 0, outside: [], spilling: [], overlapping: [], faint: [], tallest: 0,
  };

  for (const element of document.body.querySelectorAll("*")) {
    if (element.closest("svg *") || !element.checkVisibility()) continue;
    const box = element.getBoundingClientRect();
    if (box.width && beyond(box, page) && !scroller(element)) found.outside.push(brief(element, element.textContent));
    if (["figure", "li", "tr"].includes(element.localName)) found.tallest = Math.max(found.tallest, box.height);
  }

  const pieces = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement, picture = element.closest("svg");
    if (!node.data.trim() || element.closest("script, title, desc") || !element.checkVisibility()) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    // of turned text in a picture a range knows nothing
    const boxes = picture ? [element.getBoundingClientRect()] : [...range.getClientRects()];
    const style = getComputedStyle(element), ratio = contrast(rgba(picture ? style.fill : style.color), behind(element));
    const holder = picture || ancestor(element, (its) => !its.display.startsWith("inline"));
    found.texts++;
    if (ratio < 4.5) found.faint.push(`${ratio.toFixed(2)} ${brief(element, node.data)}`); // WCAG 2 AA
    for (const box of boxes.filter((its) => its.width && its.height)) {
      const frame = holder.getBoundingClientRect(), high = box.top < frame.top - SLACK || box.bottom > frame.bottom + SLACK;
      if (beyond(box, frame) || (picture && high)) found.spilling.push(brief(element, node.data));
      pieces.push({ box, node, element, window: scroller(element) });
    }
  }

  pieces.sort((a, b) => a.box.top - b.box.top);
  pieces.forEach((a, index) => {
    for (const b of pieces.slice(index + 1)) {
      if (b.box.top > a.box.bottom) break;
      if (a.node === b.node || a.window !== b.window) continue; // what scrolls is cut to its own window
      const wide = Math.min(a.box.right, b.box.right) - Math.max(a.box.left, b.box.left);
      const high = Math.min(a.box.bottom, b.box.bottom) - b.box.top;
      if (Math.min(wide, high) > 2 * SLACK) {
        found.overlapping.push(`${brief(a.element, a.node.data)} | ${brief(b.element, b.node.data)}`);
      }
    }
  });

  const written = document.createElement("pre");
  written.id = "found";
  written.textContent = JSON.stringify(found);
  document.body.append(written);
})();

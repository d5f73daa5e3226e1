"""Draws a report as one HTML file: no script, no font, no picture from elsewhere."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from saap.axes import number
from saap.charts import LEFT, SHADES, WIDTH, bars, curve, heat_map, scatter
from saap.report_data import Losses, Report


def render(report: Report) -> str:
    """The page of ``report``. All text from outside is escaped; characters UTF-8 cannot hold become "?"."""
    environment = Environment(
        loader=PackageLoader("saap", "report_template"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {
        "amount": amount, "change": change, "share": share, "setting": setting, "seconds": seconds, "words": words,
    }  # fmt: skip
    environment.globals |= {"chart_width": WIDTH, "chart_left": LEFT, "shade_count": SHADES}
    page = environment.get_template("report.html.j2").render(report=report, charts=_charts(report))
    return page.encode("utf-8", "replace").decode("utf-8")


def _charts(report: Report) -> dict[str, list[Any]]:
    """(title, text alternative, geometry) of every chart, by section."""
    before, after = report.width_names or report.names
    drawn: dict[str, list[Any]] = {"widths": [], "heat": [], "scatter": [], "losses": _losses(report.losses)}
    for widths in report.widths:
        if any(widths.before + widths.after):
            text = _describe_widths(widths.before, widths.after, widths.name, before, after)
            drawn["widths"].append((f"{widths.name} per layer", text, bars(widths.before, widths.after, widths.name)))
    for module in report.scores:
        heads = bool(module.heat.removed)
        title = f"Importance of {module.name}"
        chart = heat_map(
            module.heat, "KV head" if heads else f"share of the layer's {module.name}, least important first"
        )
        drawn["heat"].append((title, _describe_heat(module.heat.rows, module.name), chart))
        if module.points:
            removed = sum(not stays for _, _, stays in module.points)
            text = (
                f"{len(module.points):,} of {module.units:,} {module.name}, {removed:,} of those shown are removed. "
                "To the right: more important. Upwards: importance varies more between calibration sequences."
            )
            dots = scatter(module.points, "importance", "fluctuation (std / mean)")
            drawn["scatter"].append((f"{module.name}: importance against fluctuation", text, dots))
    return drawn


def _losses(losses: Losses | None) -> list[Any]:
    """As ``_charts``, of a training."""
    if losses is None or not losses.training:
        return []
    steps, training = len(losses.training), list(enumerate(losses.training, start=1))
    text = f"From {number(losses.training[0])} at step 1 to {number(losses.training[-1])} at step {steps:,}."
    drawn: list[Any] = [("Training loss", text, curve(training, steps, losses.of))]
    if losses.held_out:
        found = dict(losses.held_out)
        text = f"{len(found)} evaluations, from {number(losses.held_out[0][1])} to {number(losses.held_out[-1][1])}."
        if losses.best in found:
            text += f" Ringed: step {losses.best:,}, {number(found[losses.best])}, whose parameters were taken."
        chart = curve(losses.held_out, steps, "next-token loss", losses.best)
        drawn.append(("Held-out loss", text, chart))
    return drawn


def _describe_widths(old: list[int], new: list[int], name: str, before: str, after: str) -> str:
    shares = [b / a if a else 1.0 for a, b in zip(old, new, strict=True)]
    least, most = shares.index(min(shares)), shares.index(max(shares))
    total = f"{name}: {sum(old):,} in {before}, {sum(new):,} in {after}."
    if min(shares) == max(shares):
        return f"{total} The same share in every layer, {shares[0]:.0%}."
    return (
        f"{total} Smallest share in layer {least} ({new[least]:,} of {old[least]:,}), "
        f"largest in layer {most} ({new[most]:,} of {old[most]:,})."
    )


def _describe_heat(rows: list[list[float]], name: str) -> str:
    means = [sum(row) / len(row) if row else 0.0 for row in rows]
    least, most = means.index(min(means)), means.index(max(means))
    return (
        f"Mean importance of {name} by layer: lowest in layer {least} ({number(means[least])}), "
        f"highest in layer {most} ({number(means[most])})."
    )


def amount(value: float, unit: str) -> str:
    """A number with its unit: "count", "bytes", "perplexity" or "tokens/s"."""
    if unit == "bytes":
        for name, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
            if value >= size:
                return f"{value / size:,.2f}\N{NO-BREAK SPACE}{name}"
        return f"{value:,.0f}\N{NO-BREAK SPACE}B"
    if unit == "count":
        for name, size in (("B", 10**9), ("M", 10**6)):
            if value >= size:
                return f"{value / size:,.2f}\N{NO-BREAK SPACE}{name}"
        return f"{value:,.0f}"
    if unit == "tokens/s":
        return f"{value:,.0f}\N{NO-BREAK SPACE}tokens/s" if value >= 10 else f"{value:.2f}\N{NO-BREAK SPACE}tokens/s"
    return f"{value:,.2f}" if value < 1e5 else number(value)


def change(after: float, before: float) -> str:
    """How much ``after`` differs from ``before``, in percent; a factor from twice on."""
    if not before:
        return "unchanged" if not after else "new"
    ratio = after / before
    if ratio >= 2:
        return f"×\N{NO-BREAK SPACE}{f'{ratio:.2f}' if ratio < 100 else number(ratio)}"
    return f"{(ratio - 1) * 100:+.1f}\N{NO-BREAK SPACE}%".replace("-", "−") if ratio != 1 else "unchanged"


def share(after: float, before: float) -> str:
    return f"{after / before:.0%}" if before else "none"


def seconds(value: float) -> str:
    minutes, rest = divmod(value, 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest:.0f} s" if minutes else f"{rest:.2f} s"


def words(name: str) -> str:
    return name.replace("_", " ")


def setting(value: Any) -> str:
    """A setting as a person would write it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value == [] or value == "":
        return "none"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(setting, value))
    return str(value)

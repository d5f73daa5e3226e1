"""The tensors of a GGUF file: llama.cpp's names and types, and rows in the order of its rotary embedding."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from saap.serving.gguf_architecture import Architecture
from saap.units import LayerUnits

TYPES = ("f32", "f16", "bf16", "q8_0", "q5_0", "q5_1", "q4_0", "q4_1")
QUANTISED = TYPES[3:]
HEAD = {kind: "q8_0" if kind in QUANTISED else kind for kind in TYPES}  # where llama-quantize has q6_k, or q8_0
LARGEST_HALF = 65504.0
FLOATS = ("F64", "F32", "F16", "BF16")
LEFT_OUT = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")  # old checkpoints; recomputed
LAYER = {  # path in transformers' layer: path in llama.cpp's block
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
BASE = "model."  # what precedes, in the names of a model with a head, those of the model without
EMBEDDING, NORM, OUTPUT = "token_embd.weight", "output_norm.weight", "output.weight"
FUSED = tuple(f"self_attn.{part}_proj" for part in "qkv")


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: rows of ``sources`` one after another, stored as ``kind``.

    ``heads``: the rows of each head are brought from halves to neighbours, see ``neighbours``; 0 leaves them.
    """

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    kind: str
    heads: int = 0


class Weights:
    """The tensors of safetensors files, read one at a time; ``wanted`` are those of the model and their shapes.

    ``files`` are {name in the model: file}. A model that was saved without its head has names without BASE there.
    """

    def __init__(
        self, files: Mapping[str, Path], handles: Mapping[Path, Any], wanted: Mapping[str, tuple[int, ...]]
    ) -> None:
        self._files, self._handles, self.wanted = files, handles, wanted
        self._keys = {file: set(handle.keys()) for file, handle in handles.items()}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from its file's header; ValueError where it is missing, of other shape or no floats."""
        if name not in self._files:
            raise ValueError(f"expected a tensor {name} in the safetensors files, found none")
        piece = self._handles[self._files[name]].get_slice(self._key(name))
        if piece.get_dtype() not in FLOATS:
            raise ValueError(f"expected {name} of one of {', '.join(FLOATS)}, got {piece.get_dtype()}")
        shape = tuple(piece.get_shape())
        if shape != self.wanted[name]:
            raise ValueError(f"{self._files[name]}: expected {name} of shape {self.wanted[name]}, got {shape}")
        return shape

    def read(self, name: str) -> NDArray[np.float32]:
        """A tensor in fp32; raises ValueError for NaN and inf."""
        try:
            values = self._handles[self._files[name]].get_tensor(self._key(name)).float().numpy()
        except SafetensorError as error:
            raise ValueError(f"{self._files[name]}: {name} cannot be read: {error}") from error
        if not np.isfinite(values).all():
            raise ValueError(f"expected finite weights, found NaN or inf in {name}")
        return values

    def _key(self, name: str) -> str:
        """What the tensor is called in its file."""
        return name if name in self._keys[self._files[name]] else name.removeprefix(BASE)


@contextmanager
def opened(files: Sequence[Path], wanted: Mapping[str, tuple[int, ...]]) -> Iterator[Weights]:
    """The weights of ``files``, mapped while the context is open; ValueError for damaged files."""
    with ExitStack() as stack:
        handles: dict[Path, Any] = {}
        found: dict[str, Path] = {}
        for file in files:
            try:
                handles[file] = stack.enter_context(safe_open(file, framework="pt"))
                found |= dict.fromkeys(handles[file].keys(), file)
            except SafetensorError as error:
                raise ValueError(f"{file} is not a complete safetensors file: {error}") from error
        bare = [key for key in found if key not in wanted and BASE + key in wanted and BASE + key not in found]
        found |= {BASE + key: found.pop(key) for key in bare}
        yield Weights(found, handles, wanted)


def entries(
    weights: Weights, architecture: Architecture, layers: Sequence[LayerUnits], tied: bool, kind: str
) -> list[Entry]:
    """Every tensor of the file, layer by layer; ValueError for one that is missing or has no place in it."""
    used: set[str] = set()

    def entry(name: str, *sources: str, heads: int = 0) -> Entry:
        used.update(sources)
        shapes = [weights.shape(source) for source in sources]
        shape = (sum(each[0] for each in shapes), *shapes[0][1:])
        own = "f32" if len(shape) == 1 else HEAD[kind] if name == head else kind
        return Entry(name, sources, shape, own, heads)

    head = EMBEDDING if tied else OUTPUT
    found = [entry(EMBEDDING, "model.embed_tokens.weight")]
    for index, layer in enumerate(layers):
        prefix = f"model.layers.{index}."
        if architecture.fused:
            found.append(entry(f"blk.{index}.attn_qkv.weight", *(f"{prefix}{path}.weight" for path in FUSED)))
        for path, name in LAYER.items():
            if architecture.fused and path in FUSED:
                continue
            heads = {"attn_q": layer.query_heads, "attn_k": layer.kv_heads}.get(name, 0)
            for tensor in ("weight", "bias"):
                source = f"{prefix}{path}.{tensor}"
                if source in weights.wanted:
                    turned = heads if architecture.neighbours else 0
                    found.append(entry(f"blk.{index}.{name}.{tensor}", source, heads=turned))
    found.append(entry(NORM, "model.norm.weight"))
    if not tied:
        found.append(entry(OUTPUT, "lm_head.weight"))
    used.add("lm_head.weight")  # some files have the tied one twice
    unknown = [name for name in weights.names if name not in used and not name.endswith(LEFT_OUT)]
    if unknown:
        raise ValueError(f"llama.cpp's {architecture.name} has no place for the tensor {unknown[0]}")
    return found


def neighbours(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows (heads * head_dim, ...) with those of each head that are turned together next to each other.

    transformers turns rows j and j + head_dim / 2 of a head, llama.cpp's NORM rotary embedding 2 j and 2 j + 1.
    """
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])  # [heads, 2, head_dim / 2, ...]
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def values_of(entry: Entry, weights: Weights) -> NDArray[Any]:
    """The tensor as the file stores it: floats, or for bf16 and quantised types bytes (rows, bytes of a row)."""
    import gguf

    parts = [weights.read(source) for source in entry.sources]
    values = parts[0] if len(parts) == 1 else np.concatenate(parts)
    if entry.kind not in ("f32", "bf16") and (largest := float(np.abs(values).max(initial=0))) > LARGEST_HALF:
        raise ValueError(
            f"{entry.sources[0]} holds {largest:.3g}, beyond the fp16 of {entry.kind} files: use --type bf16 or f32"
        )
    if entry.heads:
        values = neighbours(values, entry.heads)
    return gguf.quantize(values, gguf.GGMLQuantizationType[entry.kind.upper()])


def stored_bytes(entry: Entry) -> tuple[tuple[int, ...], int]:
    """Shape and size in bytes of the array that ``values_of`` returns."""
    import gguf

    kind = gguf.GGMLQuantizationType[entry.kind.upper()]
    if entry.kind in ("f32", "f16"):
        return entry.shape, int(np.prod(entry.shape)) * (4 if entry.kind == "f32" else 2)
    shape = gguf.quant_shape_to_byte_shape(entry.shape, kind)
    return shape, int(np.prod(shape))

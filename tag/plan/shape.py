"""Dimensions of a Qwen2.5-VL and how many parameters that makes, by role. Exact, without a model."""

import json
from dataclasses import dataclass
from pathlib import Path

from tag.errors import DataError

PATCH_VALUES = 3 * 2 * 14 * 14  # numbers in a patch: colours, frames (a picture counts as two), pixels
TINY = Path(__file__).parents[1] / "assets" / "tiny-qwen2.5-vl"


@dataclass(frozen=True)
class Shape:
    """Sizes of the architecture. H, I, N, V as in tag/rollout/decoder.py; the vision tower's names start with v."""

    hidden: int  # H
    mlp: int  # I
    layers: int  # N
    heads: int
    kv_heads: int
    vocab: int  # V
    tied: bool  # the output head is the embedding
    v_hidden: int
    v_mlp: int
    v_depth: int
    v_heads: int
    patches: int = 256  # of one face: 224 x 224 pixels, 14 x 14 a patch
    merge: int = 2  # so many by so many patches make one visual token

    def __post_init__(self) -> None:
        sizes = {k: v for k, v in vars(self).items() if k != "tied"}
        if bad := [k for k, v in sizes.items() if not isinstance(v, int) or isinstance(v, bool) or not 0 < v < 2**31]:
            raise ValueError(f"{bad[0]} is {sizes[bad[0]]!r}, expected a positive whole number")
        if self.hidden % self.heads or self.heads % self.kv_heads or self.v_hidden % self.v_heads:
            raise ValueError("the heads do not divide the hidden size")

    @property
    def head_dim(self) -> int:
        """D, channels of one attention head."""
        return self.hidden // self.heads

    @property
    def kv_width(self) -> int:
        """Width of a layer's keys (and of its values)."""
        return self.kv_heads * self.head_dim

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(in, out) of the linear layers of a decoder layer, in its order: q, k, v, o, gate, up, down."""
        H, kv, I = self.hidden, self.kv_width, self.mlp
        return [(H, H), (H, kv), (H, kv), (H, H), (H, I), (H, I), (I, H)]

    # ---- parameters ---------------------------------------------------------------------------------------------

    @property
    def layer(self) -> int:
        """Parameters of one decoder layer: matrices, the biases of q, k and v, two norms."""
        return sum(i * o for i, o in self.linears) + self.hidden + 2 * self.kv_width + 2 * self.hidden

    @property
    def root(self) -> int:
        """Embedding, last norm and output head: what FSDP2 gathers as one unit."""
        return (1 if self.tied else 2) * self.vocab * self.hidden + self.hidden

    @property
    def tower(self) -> int:
        """The vision tower without the projector."""
        D, W = self.v_hidden, self.v_mlp
        attention, mlp = 4 * D * D + 4 * D, 3 * D * W + 2 * W + D
        return D * PATCH_VALUES + self.v_depth * (2 * D + attention + mlp)

    @property
    def projector(self) -> int:
        """The patch merger: a norm and two linear layers with biases."""
        wide = self.v_hidden * self.merge**2
        return self.v_hidden + wide * wide + wide + wide * self.hidden + self.hidden

    @property
    def language_model(self) -> int:
        """Decoder layers and root."""
        return self.layers * self.layer + self.root

    @property
    def total(self) -> int:
        """All parameters of the base model."""
        return self.language_model + self.tower + self.projector

    def lora_layer(self, rank: int) -> int:
        """Adapter parameters of one decoder layer."""
        return rank * sum(i + o for i, o in self.linears)

    def lora(self, rank: int) -> int:
        """Parameters of one adapter."""
        return self.layers * self.lora_layer(rank)

    @property
    def kv_per_token(self) -> int:
        """Numbers in the key/value cache for one token."""
        return self.layers * 2 * self.kv_width

    @property
    def visual_tokens(self) -> int:
        """Tokens one face makes."""
        return self.patches // self.merge**2


def by_role(shape: Shape, rank: int) -> dict[str, int]:
    """Parameters by role."""
    return {
        "decoder layers": shape.layers * shape.layer,
        "embeddings, norm, head": shape.root,
        "vision tower": shape.tower,
        "projector": shape.projector,
        f"LoRA, rank {rank}": shape.lora(rank),
    }


# From the published config.json of each (Qwen/Qwen2.5-VL-*-Instruct).
PUBLISHED = {
    "3B": Shape(2048, 11008, 36, 16, 2, 151936, True, 1280, 3420, 32, 16),
    "7B": Shape(3584, 18944, 28, 28, 4, 152064, False, 1280, 3420, 32, 16),
    "32B": Shape(5120, 27648, 64, 40, 8, 152064, False, 1280, 3456, 32, 16),
}


def read_shape(model: str) -> Shape:
    """The dimensions of a model: "tiny", a checkpoint folder, a config.json, or the name of a published one (its size
    is enough: "7B").

    Raises DataError (one line) when it is none of these, or not a Qwen2.5-VL.
    """
    path = TINY if model == "tiny" else Path(model)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        return _from_file(path)
    for size, shape in PUBLISHED.items():
        if model.lower() in (size.lower(), f"qwen/qwen2.5-vl-{size}-instruct".lower()):
            return shape
    names = ", ".join(f"Qwen/Qwen2.5-VL-{size}-Instruct" for size in PUBLISHED)
    raise DataError(f"--model {model}: neither a folder nor a config.json, and not one of {names}")


def _from_file(path: Path) -> Shape:
    try:
        content = json.loads(path.read_text())
        if content["model_type"] != "qwen2_5_vl":
            raise ValueError(f"it is of a {str(content['model_type'])[:40]} model")
        # Hub files have the text model's sizes at the top; files that transformers 5 writes have them apart.
        return shape_of({**content, **(content.get("text_config") or {})}, content["vision_config"], content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        reason = f"{e.args[0]} is missing" if isinstance(e, KeyError) else str(e).splitlines()[0][:120]
        raise DataError(f"{path} is not a Qwen2.5-VL configuration: {reason}") from None


def shape_of(text: dict, vision: dict, whole: dict) -> Shape:
    """Dimensions from the dictionaries of a configuration: text model, vision tower, the whole. Sizes of the tower that
    a file leaves out are those of the published models, as in transformers. Raises KeyError, ValueError."""
    side = 224 // vision.get("patch_size", vision.get("spatial_patch_size", 14))
    return Shape(
        hidden=text["hidden_size"],
        mlp=text["intermediate_size"],
        layers=text["num_hidden_layers"],
        heads=text["num_attention_heads"],
        kv_heads=text.get("num_key_value_heads") or text["num_attention_heads"],
        vocab=text["vocab_size"],
        tied=bool(whole.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
        v_hidden=vision.get("hidden_size", 1280),
        v_mlp=vision.get("intermediate_size", 3420),
        v_depth=vision.get("depth", 32),
        v_heads=vision.get("num_heads", 16),
        patches=side * side,
        merge=vision.get("spatial_merge_size", 2),
    )

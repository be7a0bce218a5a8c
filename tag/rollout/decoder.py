"""Qwen2.5-VL's text decoder for sampling: merged weights in buffers of its own, and two entry points.

    prefill   whole prompts, causal attention: gives their KV and the logits of the first token
    step      one token for each of R rows, attending to what is in the cache (tag/rollout/cache.py)

The weights are copied in place by `load`, so that their addresses never change (CUDA graphs hold on to them) and
nothing is allocated from one RL step to the next. Linear layers that read the same input are fused into one, unless
that is switched off.

Shapes:  R rows;  S prompts, P prompt length;  N layers;  H hidden;  V vocabulary;  I MLP width;  K key/value heads,
         G query heads for each of them, D head size (K * G * D = H).

One projection gives queries, keys and values *by key/value head*: (K, G + 2, D) = G query heads, the key, the value.
So the heads that attend to the same keys lie together, R and K fold into one batch dimension without a copy, and a
token's key and value are written to the cache by one operation.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tag.linear import add_linear, linear
from tag.rollout.cache import CacheView


@dataclass
class Layer:
    """Weights of one decoder layer."""

    input_norm: Tensor  # (H,)
    qkv: list[Tensor]  # one (K * (G + 2) * D, H); apart: (K * G * D, H), (K * D, H), (K * D, H)
    qkv_bias: list[Tensor]  # one (K * (G + 2) * D,), or three
    o: Tensor  # (H, H)
    post_norm: Tensor  # (H,)
    gate_up: list[Tensor]  # one (2 * I, H), or two (I, H)
    down: Tensor  # (H, I)

    @property
    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [t for field in vars(self).values() for t in (field if isinstance(field, list) else [field])]


class TextDecoder:
    """The language model of Qwen2.5-VL, for inference."""

    def __init__(
        self, config, device: torch.device, dtype: torch.dtype, compiled: bool = False, fused: bool = True
    ) -> None:
        """compiled: `torch.compile` what stands between the matrix products and attention of a decoding step.
        fused: one product for queries, keys and values and one for gate and up, instead of five."""
        _check_supported(config)
        if compiled:
            self._project = torch.compile(self._project, dynamic=True)
            self._mlp = torch.compile(self._mlp, dynamic=True)
        self.device, self.dtype, self.eps = device, dtype, config.rms_norm_eps
        self.H, self.V, self.I = config.hidden_size, config.vocab_size, config.intermediate_size
        self.N, self.K = config.num_hidden_layers, config.num_key_value_heads
        self.G = config.num_attention_heads // self.K
        self.D = self.H // config.num_attention_heads

        def new(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        def matrix(out_features: int, in_features: int) -> Tensor:
            if device.type == "cpu":  # the order in which oneDNN reads it fastest
                return new(in_features, out_features).t()
            return new(out_features, in_features)

        heads = [self.G + 2] if fused else [self.G, 1, 1]  # of each projection, for one key/value head
        qkv_rows = [self.K * n * self.D for n in heads]
        gate_up_rows = [2 * self.I] if fused else [self.I, self.I]
        self.layers = [
            Layer(
                input_norm=new(self.H),
                qkv=[matrix(rows, self.H) for rows in qkv_rows],
                qkv_bias=[new(rows) for rows in qkv_rows],
                o=matrix(self.H, self.H),
                post_norm=new(self.H),
                gate_up=[matrix(rows, self.H) for rows in gate_up_rows],
                down=matrix(self.H, self.I),
            )
            for _ in range(self.N)
        ]
        self.embed, self.norm = new(self.V, self.H), new(self.H)
        tied = getattr(config, "tie_word_embeddings", False)  # older text configurations do not say: then a copy
        self.head = self.embed if tied else new(self.V, self.H)
        self._places = self._named_places()

        half = torch.arange(0, self.D, 2, dtype=torch.float, device=device)
        self.inv_freq = 1.0 / config.rope_parameters["rope_theta"] ** (half / self.D)  # (D / 2,)
        # mRoPE: which of the three position axes (time, height, width) turns each frequency.
        section = torch.tensor(config.rope_parameters.get("mrope_section", [self.D // 2, 0, 0]), device=device)
        self.axis = torch.repeat_interleave(torch.arange(3, device=device), section)  # (D / 2,)

    # ---- weights ----------------------------------------------------------------------------------------------

    def _named_places(self) -> dict[str, Tensor]:
        """Hugging Face name -> the view of our buffers that the tensor of that name is copied to."""
        places = {"embed_tokens.weight": self.embed, "norm.weight": self.norm, "lm_head.weight": self.head}
        K, G, D = self.K, self.G, self.D
        for i, layer in enumerate(self.layers):
            weights = [w.view(K, -1, D, self.H) for w in layer.qkv]  # (K, G + 2, D, H), or G, 1 and 1
            biases = [b.view(K, -1, D) for b in layer.qkv_bias]
            if len(weights) == 1:
                weights, biases = ([*t[0].split([G, 1, 1], dim=1)] for t in (weights, biases))
            for name, weight, bias in zip(("q_proj", "k_proj", "v_proj"), weights, biases):
                places[f"layers.{i}.self_attn.{name}.weight"] = weight  # (K, G or 1, D, H)
                places[f"layers.{i}.self_attn.{name}.bias"] = bias
            gate, up = layer.gate_up if len(layer.gate_up) == 2 else layer.gate_up[0].chunk(2)
            places[f"layers.{i}.self_attn.o_proj.weight"] = layer.o
            places[f"layers.{i}.mlp.gate_proj.weight"] = gate
            places[f"layers.{i}.mlp.up_proj.weight"] = up
            places[f"layers.{i}.mlp.down_proj.weight"] = layer.down
            places[f"layers.{i}.input_layernorm.weight"] = layer.input_norm
            places[f"layers.{i}.post_attention_layernorm.weight"] = layer.post_norm
        return places

    @torch.no_grad()
    def load(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copy every weight into its place.

        Takes the whole iterator whatever happens: gathering a sharded tensor is a collective, and a rank that stopped
        early would leave the others waiting. Raises ValueError afterwards if a tensor was unknown or missing.
        """
        unknown, missing, tied = [], set(self._places), True
        for name, tensor in named_tensors:
            place = self._places.get(name)
            if place is None or place.numel() != tensor.numel():
                unknown.append(f"{name} {tuple(tensor.shape)}")
                continue
            missing.discard(name)
            if name == "lm_head.weight" and place is self.embed:  # comes after the embedding: one buffer for both
                tied = torch.equal(place, tensor.detach().to(place))
            else:
                place.copy_(tensor.detach().view(place.shape))
        if unknown or missing:
            raise ValueError(
                f"weights do not fit the rollout decoder: {len(unknown)} unknown or of another size {unknown[:3]}, "
                f"{len(missing)} missing {sorted(missing)[:3]}"
            )
        if not tied:
            raise ValueError("the configuration ties lm_head to embed_tokens, but their weights differ")

    @property
    def weight_bytes(self) -> int:
        """Bytes of the engine's own copy of the weights."""
        tensors = {t.data_ptr(): t for layer in self.layers for t in layer.tensors}
        tensors |= {t.data_ptr(): t for t in (self.embed, self.norm, self.head)}
        return sum(t.numel() * t.element_size() for t in tensors.values())

    # ---- forward ----------------------------------------------------------------------------------------------

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and signed sin for `rotate`. positions (3, ...) mRoPE or, all axes equal, (...). Returns two (..., D)."""
        # Angles in fp32 (bfloat16 cannot tell position 257 from 256), then rounded as Hugging Face rounds them.
        if positions.ndim > 1:
            positions = positions[self.axis].movedim(0, -1)  # (..., D / 2), the axis of each frequency
        else:
            positions = positions[..., None]
        angle = positions * self.inv_freq  # (..., D / 2)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([cos, cos], -1).to(self.dtype), torch.cat([-sin, sin], -1).to(self.dtype)

    def prefill(self, embeds: Tensor, position_ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Run whole prompts, padded on the right: causal attention never looks there, so no mask is needed.

        embeds (S, P, H), position_ids (3, S, P), lengths (S,) of the prompts without padding. Returns the KV
        (N, S, K, 2, P, D) and the logits of the token after each prompt (S, V).
        """
        S, P, H = embeds.shape
        K, G, D = self.K, self.G, self.D
        cos, sin = (t.view(S, P, 1, 1, D) for t in self.rotary(position_ids))
        kv = torch.empty(self.N, S, K, 2, P, D, dtype=self.dtype, device=self.device)
        x = embeds.reshape(S * P, H)  # (S * P, H), new: the residual stream is updated in place
        for i, layer in enumerate(self.layers):
            qkv = self._heads(self._norm(x, layer.input_norm), layer.qkv, layer.qkv_bias).view(S, P, K, G + 2, D)
            rotate_(qkv[..., : G + 1, :], cos, sin)
            qkv = qkv.permute(0, 2, 3, 1, 4)  # (S, K, G + 2, P, D)
            kv[i].copy_(qkv[:, :, G:])
            q = qkv[:, :, :G].reshape(S, K * G, P, D)
            k, v = (qkv[:, :, j, None].expand(S, K, G, P, D).reshape(S, K * G, P, D) for j in (G, G + 1))
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (S, K * G, P, D)
            attended = attended.transpose(1, 2).reshape(S * P, H)
            x = self._mlp(add_linear(x, attended, layer.o), layer.post_norm, layer.gate_up, layer.down)
        last = x.view(S, P, H)[torch.arange(S, device=x.device), lengths - 1]  # (S, H)
        return kv, linear(self._norm(last, self.norm), self.head)

    def step(self, tokens: Tensor, positions: Tensor, count: Tensor, cache: CacheView, logits: Tensor) -> None:
        """One token for each row: store its KV, leave the logits of the next token in `logits`.

        tokens, positions (rotary), count (how many tokens each row has had before) (R,) int64; logits (R, V).
        """
        R, K, G, D = len(tokens), self.K, self.G, self.D
        cos, sin = (t.view(R, 1, 1, D) for t in self.rotary(positions))
        cache.begin_step(count)
        x = F.embedding(tokens, self.embed)  # (R, H)
        for i, layer in enumerate(self.layers):
            qkv = self._project(x, layer.input_norm, layer.qkv, layer.qkv_bias, cos, sin)  # (R, K, G + 2, D)
            attended = cache.attend(i, qkv.view(R * K, G + 2, D)).view(R, self.H)
            x = self._mlp(add_linear(x, attended, layer.o), layer.post_norm, layer.gate_up, layer.down)
        logits.copy_(linear(self._norm(x, self.norm), self.head))

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (self.H,), weight, self.eps)

    def _heads(self, x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
        """Queries, keys and values of normed x (M, H): (M, K, G + 2, D)."""
        parts = [linear(x, w, b).view(len(x), self.K, -1, self.D) for w, b in zip(weights, biases)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def _project(
        self, x: Tensor, norm: Tensor, qkv: list[Tensor], bias: list[Tensor], cos: Tensor, sin: Tensor
    ) -> Tensor:
        """Queries, keys and values of x (R, H), rotated: (R, K, G + 2, D)."""
        out = self._heads(self._norm(x, norm), qkv, bias)
        rotate_(out[:, :, : self.G + 1], cos, sin)
        return out

    def _mlp(self, x: Tensor, norm: Tensor, gate_up: list[Tensor], down: Tensor) -> Tensor:
        """x + SwiGLU(norm(x)), x (M, H)."""
        x_norm = self._norm(x, norm)
        parts = [linear(x_norm, weight) for weight in gate_up]
        gate, up = parts if len(parts) == 2 else parts[0].chunk(2, dim=-1)  # (M, I) each
        return add_linear(x, F.silu(gate, inplace=True).mul_(up), down)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotary embedding in place: (a, b) -> (a cos - b sin, b cos + a sin) for the two halves a, b of the last axis.

    x (..., D); cos and sin broadcast to it, `sin` with its first half negated.
    """
    swapped = x.roll(x.shape[-1] // 2, dims=-1)  # (b, a)
    x.mul_(cos).addcmul_(swapped, sin)


def _check_supported(config) -> None:
    """Raise ValueError for a text configuration that this decoder would compute wrongly."""
    problems = []
    if config.rope_parameters.get("rope_type", "default") not in ("default", "mrope"):
        problems.append(f"rope_type {config.rope_parameters['rope_type']!r}")
    if config.hidden_act != "silu":
        problems.append(f"hidden_act {config.hidden_act!r}")
    if any(kind != "full_attention" for kind in config.layer_types):
        problems.append("sliding-window attention")
    if problems:
        raise ValueError(f"the rollout engine does not support {', '.join(problems)}; use the hf rollout backend")

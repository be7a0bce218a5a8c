"""Stage 2 of the tiny base model: the language model learns to talk about the faces that the tower already sees.

One sequence holds one face and all its questions: `<image> question answer | question answer | ...`. Every pair
attends to the image and to itself alone, and its rotary positions restart after the image, so each pair is a
conversation of its own (no answer can be read off an earlier one) while the 64 image tokens are computed once.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tag.tiny.questions import Question
from tag.tiny.tower import GRID, MERGE, norm, rotate

SIDE = GRID // MERGE
IMAGE_TOKENS = SIDE * SIDE


@dataclass(frozen=True)
class Batch:
    """Padded sequences. The image tokens stand at `image_at` in every row."""

    ids: Tensor  # (B, T)
    positions: Tensor  # (3, B, T) time, height, width
    mask: Tensor  # (B, 1, T, T) True where attention is allowed
    targets: Tensor  # (B, T) the next token where it is learnt, else -100
    image_at: slice


class Packer:
    """Builds batches of packed conversations with the tokenizer's own chat template."""

    def __init__(self, tokenizer):
        turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\0"}]}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        before, after = text.split("\0")
        before = tokenizer(before).input_ids
        self.pad_id = tokenizer.pad_token_id
        self.end_id = tokenizer.eos_token_id
        at = before.index(tokenizer.convert_tokens_to_ids("<|image_pad|>"))
        self.prefix = before[:at] + [before[at]] * IMAGE_TOKENS + before[at + 1 :]
        self.image_at = slice(at, at + IMAGE_TOKENS)
        self.after = tokenizer(after).input_ids
        self._tokenizer = tokenizer
        self._cache: dict[str, list[int]] = {}
        cell = torch.arange(IMAGE_TOKENS)
        rest = torch.arange(len(self.prefix) - at - IMAGE_TOKENS) + at + SIDE
        image = torch.stack([torch.full_like(cell, at), at + cell // SIDE, at + cell % SIDE])
        self.prefix_positions = torch.cat([torch.arange(at).expand(3, -1), image, rest.expand(3, -1)], 1)
        self.start = int(rest[-1]) + 1  # rotary position of the first token after the prefix

    def pieces(self) -> list[str]:
        """The text of every ordinary token that is whole characters."""
        texts = [self._tokenizer.decode([i]) for i in self.ordinary_ids()]
        return [t for t in texts if t.isprintable() and "\ufffd" not in t]

    def ordinary_ids(self) -> list[int]:
        """Ids of all tokens that are not special."""
        special = set(self._tokenizer.all_special_ids)
        return [i for i in range(len(self._tokenizer)) if i not in special]

    def encode(self, text: str) -> list[int]:
        """Token ids of a short text; cached, since questions repeat."""
        if text not in self._cache:
            if len(self._cache) > 200_000:
                self._cache.clear()
            self._cache[text] = self._tokenizer(text).input_ids
        return self._cache[text]

    def decode(self, ids: list[int]) -> str:
        """Text of generated token ids."""
        return self._tokenizer.decode(ids)

    def prompt(self, question: str) -> list[int]:
        """Everything up to where the answer begins."""
        return self.prefix + self.encode(question) + self.after

    def batch(self, faces: list[list[Question]], width: int | None = None) -> Batch:
        """One row per face, its questions packed one after the other.

        With `width` every row has that many tokens (one shape to compile), and what does not fit is not asked.
        """
        rows = [self._row(questions, width) for questions in faces]
        width, lead = width or max(len(r[0]) for r in rows), len(self.prefix)
        ids = torch.full((len(rows), width), self.pad_id)
        targets, segments = torch.full_like(ids, -100), torch.full_like(ids, -1)
        positions = torch.zeros(3, *ids.shape, dtype=torch.long)
        for i, (row, target, segment, place) in enumerate(rows):
            n = len(row)
            ids[i, :n], targets[i, :n] = torch.tensor(row), torch.tensor(target)
            segments[i, :n], positions[:, i, lead:n] = torch.tensor(segment), torch.tensor(place)
        positions[:, :, :lead] = self.prefix_positions[:, None]
        same = segments[:, :, None] == segments[:, None, :]
        mask = (same | (segments[:, None, :] == 0)).tril()  # padding sees padding: no row without a key
        return Batch(ids, positions, mask[:, None], targets, self.image_at)

    def _row(self, questions: list[Question], width: int | None) -> tuple[list[int], ...]:
        ids, targets = list(self.prefix), [-100] * len(self.prefix)
        segments, places = [0] * len(self.prefix), []
        for number, q in enumerate(questions, 1):
            asked = self.encode(q.question) + self.after
            answer = [*self.encode(q.answer), self.end_id]
            if width and len(ids) + len(asked) + len(answer) - 1 > width:
                continue
            ids += asked + answer[:-1]
            targets += [-100] * (len(asked) - 1) + answer
            length = len(asked) + len(answer) - 1
            segments += [number] * length
            places += range(self.start, self.start + length)
        return ids, targets, segments, places


def decoder(text: nn.Module, embeds: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    """The forward pass of Qwen2.5-VL's language model on the weights of `text`; the library's, without its wrappers.

    Lean enough for `torch.compile` to fuse, which at this width is worth more than faster matrix products.
    """
    section = text.rotary_emb.mrope_section
    angles = positions[..., None].float() * text.rotary_emb.inv_freq
    angles = torch.cat([part[i % 3] for i, part in enumerate(angles.split(section, dim=-1))], -1)
    angles = torch.cat([angles, angles], -1)[:, :, None]
    cos, sin = angles.cos(), angles.sin()
    x = embeds
    for layer in text.layers:
        attn, (b, n, _) = layer.self_attn, x.shape
        y = norm(x, layer.input_layernorm)
        q, k, v = (f(y).view(b, n, -1, attn.head_dim) for f in (attn.q_proj, attn.k_proj, attn.v_proj))
        q, k = (rotate(t, cos, sin).to(v.dtype) for t in (q, k))
        k, v = (t.repeat_interleave(attn.num_key_value_groups, dim=2) for t in (k, v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + attn.o_proj(y.transpose(1, 2).flatten(2))
        x = x + layer.mlp(norm(x, layer.post_attention_layernorm))
    return norm(x, text.norm)


def language_loss(model: nn.Module, features: Tensor, batch: Batch, forward=decoder) -> Tensor:
    """Mean cross-entropy on the answer tokens; `features` (B, 64, hidden) stand in the image slots."""
    embeds = model.model.language_model.embed_tokens(batch.ids)
    before, after = embeds[:, : batch.image_at.start], embeds[:, batch.image_at.stop :]
    embeds = torch.cat([before, features.to(embeds.dtype), after], 1)
    return next_token_loss(model, embeds, batch.positions, batch.mask, batch.targets, forward)


def next_token_loss(
    model: nn.Module, embeds: Tensor, positions: Tensor, mask: Tensor, targets: Tensor, forward=decoder
) -> Tensor:
    """Mean cross-entropy where `targets` (B, T) is not -100."""
    learnt = targets >= 0
    hidden = forward(model.model.language_model, embeds, positions, mask)[learnt]
    return F.cross_entropy(model.lm_head(hidden).float(), targets[learnt])


@torch.no_grad()
def answer(
    model: nn.Module, packer: Packer, features: Tensor, questions: list[str], limit: int = 48
) -> list[list[int]]:
    """Greedy answers (token ids without the end token), one question per face; a check, not the rollout engine.

    Rows are grouped by prompt length, so that nothing is padded.
    """
    text = model.model.language_model
    prompts = [packer.prompt(q) for q in questions]
    answers: list[list[int]] = [[] for _ in prompts]
    for length in sorted({len(p) for p in prompts}):
        rows = [i for i, p in enumerate(prompts) if len(p) == length]
        ids = torch.tensor([prompts[i] for i in rows])
        embeds = text.embed_tokens(ids)
        embeds[:, packer.image_at] = features[rows].to(embeds.dtype)
        tail = torch.arange(packer.start, packer.start + length - len(packer.prefix)).expand(3, -1)
        positions = torch.cat([packer.prefix_positions, tail], 1)[:, None].expand(3, len(rows), -1)
        going, cache = torch.ones(len(rows), dtype=torch.bool), None
        for step in range(limit):
            out = text(inputs_embeds=embeds, position_ids=positions, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            token = model.lm_head(out.last_hidden_state[:, -1]).argmax(-1)
            going &= token != packer.end_id
            if not going.any():
                break
            for i, t, on in zip(rows, token.tolist(), going.tolist()):
                if on:
                    answers[i].append(t)
            embeds = text.embed_tokens(token)[:, None]
            positions = torch.full((3, len(rows), 1), int(tail[0, -1]) + 1 + step)
    return answers

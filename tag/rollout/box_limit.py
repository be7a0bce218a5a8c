"""At most so many `<bbox>` in a completion, as a mask over the vocabulary.

Tags are plain text: `<bbox>` is several ordinary tokens, and any of its characters may be glued to a neighbour in one
token (`.<`, `>[`, `><`). So the mask follows the *text*: an automaton that looks for `<bbox>` is in state s when the
text so far ends in the first s characters of it, and two tables (state x token) say in which state a token leaves the
automaton and how many openings it completes on the way. A token is forbidden when it would complete one too many.

The mask changes the distribution that is sampled from. A trainer that scores such completions must apply the same one
before its log-softmax: `scan` gives the automaton before each token, `forbidden` the masks.

Shapes:  B completions, T tokens, M positions, V vocabulary.
"""

import torch
from torch import Tensor

OPENING = "<bbox>"


class BoxLimit:
    """Mask tables for one tokenizer."""

    def __init__(self, tokenizer, vocab_size: int, max_boxes: int, device: torch.device | str = "cpu") -> None:
        if max_boxes < 0:
            raise ValueError(f"max_boxes must not be negative, got {max_boxes}")
        self.max_boxes = max_boxes
        pieces = token_pieces(tokenizer, vocab_size)
        table = [[_run(state, piece) for piece in pieces] for state in range(len(OPENING))]
        next_state, opened = torch.tensor(table, device=device).unbind(-1)  # (states, V), (states, V)
        self.next_state, self.opened = next_state.contiguous(), opened.contiguous()

    def forbidden(self, state: Tensor, count: Tensor) -> Tensor:
        """Tokens that must not come next: state and count (M,) int64 -> (M, V) bool."""
        return count[:, None] + self.opened[state] > self.max_boxes

    def advance(self, state: Tensor, count: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The automaton after one more token; all (M,) int64."""
        return self.next_state[state, tokens], count + self.opened[state, tokens]

    def scan(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Automaton *before* each token of completions (B, T), padded behind: state and count, both (B, T)."""
        state = count = torch.zeros_like(token_ids[:, 0])  # (B,)
        states, counts = [], []
        for tokens in token_ids.unbind(1):
            states.append(state)
            counts.append(count)
            state, count = self.advance(state, count, tokens)
        return torch.stack(states, 1), torch.stack(counts, 1)


def token_pieces(tokenizer, vocab_size: int) -> list[str]:
    """What each token adds to the decoded text, as far as ASCII goes; "" for special tokens and unused ids.

    A byte-level BPE vocabulary spells printable ASCII as itself and every other byte as some non-ASCII character, and
    `<bbox>` is printable ASCII, so the vocabulary's own spelling serves without decoding it. Special tokens are left
    out of a completion's text: `<bb`, a special token, `ox>` reads `<bbox>`.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    pieces = tokenizer.convert_ids_to_tokens(list(range(min(vocab_size, len(tokenizer)))))
    pieces = ["" if i in special or piece is None else piece for i, piece in enumerate(pieces)]
    return pieces + [""] * (vocab_size - len(pieces))


def _run(state: int, piece: str) -> tuple[int, int]:
    """(state, openings completed) after reading `piece`."""
    if not piece:
        return state, 0
    if piece[0] != OPENING[state] and OPENING[0] not in piece:  # most of a vocabulary
        return 0, 0
    opened = 0
    for character in piece:
        # `<` occurs in the tag only as its first character, so a mismatch falls back to state 0 or 1, nowhere else.
        if character == OPENING[state]:
            state += 1
        else:
            state = int(character == OPENING[0])
        if state == len(OPENING):
            state, opened = 0, opened + 1
    return state, opened

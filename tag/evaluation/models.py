"""Who answers: one interface for our checkpoints, any Hugging Face image-text model, and models behind servers.

`tag.evaluation.hf_model` and `tag.evaluation.server_model` hold the other two. All get the prompt of `tag.prompts` and
the face on the square canvas that the boxes refer to, and decode greedily.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image

from tag.dist import Dist
from tag.evaluation.answers import Face, read_images
from tag.evaluation.generate import greedy
from tag.lora import load_adapter
from tag.rollout import RolloutEngine, kv_plan
from tag.trace import MAX_BOXES
from tag.vlm import load_vlm


@dataclass(frozen=True)
class Answer:
    """What a model wrote on one face; the fields are those of `tag.evaluation.predictions.Prediction`."""

    text: str
    num_tokens: int | None = None
    finish_reason: str = ""
    prompt_tokens: int | None = None
    cost: float | None = None


class Model:
    """Base of the models. batch_size: faces asked about together; None: each question stands by itself.

    turned_down: index of a face -> why it will never get an answer. complaint: why faces were left without an answer
    that they may get another time, "" if none was.
    """

    batch_size: int | None = None

    def __init__(self) -> None:
        self.turned_down: dict[int, str] = {}

    def answer(self, faces: Sequence[Face]) -> Iterator[list[tuple[Face, Answer]]]:
        """Answers as they come. Those of a model with a `batch_size` come all at once. Raises DataError."""
        raise NotImplementedError

    def complaint(self) -> str:
        """See the class."""
        return ""


class BatchModel(Model):
    """A model in this process: all images of a batch go in together."""

    def complete(self, images: Sequence[Image.Image]) -> list[Answer]:
        """An answer for each image."""
        raise NotImplementedError

    def answer(self, faces: Sequence[Face]) -> Iterator[list[tuple[Face, Answer]]]:
        """See `Model.answer`."""
        if faces:
            yield list(zip(faces, self.complete(read_images(faces)), strict=True))


class EngineModel(BatchModel):
    """A Qwen2.5-VL checkpoint of ours, bare or with an adapter, through the rollout engine: the face is letterboxed to
    224 x 224 pixels as in training."""

    def __init__(self, args, here: Dist) -> None:
        super().__init__()
        self.vlm = load_vlm(args.model, args.dtype, here.device)
        if args.adapter:
            load_adapter(self.vlm.hf_model, args.adapter)
        self.vlm.requires_grad_(False)
        self.engine = RolloutEngine(self.vlm, args.rollout_rows, args.max_new_tokens, cuda_graphs=args.cuda_graphs)
        self.prompt = self.vlm.prompt()
        here.print(kv_plan(self.engine, len(self.prompt.input_ids), 1))
        self.engine.refresh("policy" if args.adapter else None)
        self.batch_size, self.max_new_tokens = args.rollout_rows, args.max_new_tokens
        self.max_boxes = None if args.no_box_limit else MAX_BOXES

    def complete(self, images: Sequence[Image.Image]) -> list[Answer]:
        """See `BatchModel.complete`."""
        rollouts = greedy(self.engine, self.prompt, self.vlm.encode(images), self.max_new_tokens, self.max_boxes)
        return [Answer(r.text, len(r.token_ids), r.finish_reason) for r in rollouts]


def load_model(args, here: Dist) -> Model:
    """The model that the flags of eval.py ask for. Raises DataError, UsageError."""
    if args.backend == "hf":
        from tag.evaluation.hf_model import HFModel

        return HFModel(args, here)
    if args.backend == "openai":
        from tag.evaluation.server_model import ServerModel

        return ServerModel(args, here)
    return EngineModel(args, here)

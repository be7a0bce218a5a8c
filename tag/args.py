"""What the command lines share: presets, one-line errors with exit code 2, the flags of both training stages."""

import argparse
import contextlib
import errno
import os
import select
import sys
import traceback
from collections.abc import Callable

from tqdm import tqdm

from tag.errors import DataError, UsageError


class Parser(argparse.ArgumentParser):
    """argparse with defaults shown in --help and `--preset NAME ...` applied before the other flags.

    presets: name -> values by flag. Several may be chosen, `--preset tiny dapo` or `--preset tiny --preset dapo`; where
    two give the same flag a value, that of the later name holds. `args.preset` is the list of names, None without any.
    """

    def __init__(self, doc: str | None, presets: dict[str, dict] | None = None) -> None:
        summary = (doc or "").strip()
        super().__init__(description=summary, formatter_class=_HelpFormatter, allow_abbrev=False)
        self.presets = presets or {}
        if self.presets:
            about = "documented sets of defaults, one or more; where two differ the later one holds"
            self.add_argument("--preset", nargs="+", action="extend", choices=[*self.presets], help=about)

    def error(self, message: str) -> None:  # type: ignore[override]
        """One line instead of the whole usage."""
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:  # type: ignore[override]
        """Parse; values of the chosen presets replace defaults, flags on the command line win over both."""
        argv = sys.argv[1:] if args is None else list(args)
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        if self.presets:
            first.add_argument("--preset", nargs="*", action="extend")  # bad names are the full parser's to refuse
        known = {action.dest for action in self._actions}
        for name in getattr(first.parse_known_args(argv)[0], "preset", None) or ():
            values = self.presets.get(name, {})
            if unknown := set(values) - known:
                raise AssertionError(f"preset {name} sets flags that do not exist: {sorted(unknown)}")
            self.set_defaults(**values)
            for action in self._actions:
                if action.dest in values:
                    action.required = False
        return super().parse_args(argv, namespace)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults behind the flags, but for switches, flags off unless given, and texts that say it themselves."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or "(default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def _nobody_reads() -> bool:
    """Whether standard output is a pipe without a reader: the pipe that broke may be another one, a worker's."""
    with contextlib.suppress(AttributeError, OSError, ValueError):  # no poll on Windows; no file behind stdout
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    return False


def run(main: Callable[[], None]) -> None:
    """Call a script's main; bad usage or input becomes one line on stderr and exit code 2."""

    def leave(code: int) -> None:
        if _group_stands():  # the others wait for us: nothing on the way out may wait for them
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        sys.exit(code)

    def say(text: str) -> None:
        rank = os.environ.get("RANK", "0")
        where = "" if rank == "0" else f"[rank {rank}] "
        # Through tqdm: on a terminal a progress bar may stand on the current line.
        tqdm.write(f"{where}error: {' '.join(text.split())}", file=sys.stderr)

    try:
        main()
    except (UsageError, DataError) as e:
        if os.environ.get("RANK", "0") == "0" or not getattr(e, "everywhere", False):
            say(str(e))
        leave(2)
    except OSError as e:
        if e.errno == errno.EPIPE and _nobody_reads():  # `| head`, a pager that was left
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the last flush complains
            leave(141)  # what a shell calls an end by SIGPIPE
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
            raise
        where = e.filename or "an output file"
        say(f"{e.strerror}: {where}; the checkpoints are whole: make room, then repeat the same command")
        leave(2)
    except KeyboardInterrupt:
        leave(130)
    finally:
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, SystemExit) and _group_stands():  # a defect of ours
            traceback.print_exc()
            leave(1)


def _group_stands() -> bool:
    """Whether this process is in a group that `tag.dist.cleanup` has left as it is."""
    group = sys.modules.get("torch.distributed")  # not imported for this: most tools do without torch
    return group is not None and group.is_available() and group.is_initialized()


def check(condition: bool, message: str) -> None:
    """Raise UsageError(message) unless `condition`."""
    if not condition:
        raise UsageError(message)


# Flags that say how a run is computed, not which run it is: they may change when it is resumed. A preset is a name for
# values of other flags, and those are compared (tag/runfolder.py).
RUNTIME_FLAGS = frozenset(
    {"preset", "out", "micro_tokens", "device", "threads", "save_every", "keep_checkpoints", "rollout_rows"}
    | {"activation_checkpointing", "kv_gb", "cuda_graphs", "compile", "workers", "no_fused_optimizer"}
    | {"dense_attention", "no_memory_check", "no_onednn", "no_frozen_shortcut", "no_fused_projections", "token_cache"}
    | {"save_minutes", "max_skipped", "slow_minutes", "hang_minutes", "on_bad_image", "hf_tower"}
    | {"shard", "stop_after", "cache_gb", "record_every", "record_state", "record_budget_mb", "waive_gates"}
)


NO_ONEDNN = "float32 on a CPU by PyTorch's BLAS, without oneDNN (tag/linear.py)"


def add_running_flags(p: Parser, micro_tokens: int, save_every: int) -> Callable:
    """Add the flags that both training stages share on how a run is computed; returns add_argument of their group.

    micro_tokens, save_every: the stage's defaults.
    """
    from tag.data.faces import BAD_IMAGE
    from tag.dist import SHARDING  # here, because torch takes seconds to import and most tools do without it

    a = p.add_argument_group("how it runs (never changes loss or gradient)").add_argument
    a("--micro-tokens", type=int, default=micro_tokens, help="tokens of one forward pass, per rank: the memory knob")
    a("--rollout-rows", type=int, default=64, help="rows that decode together, per rank, fewer if memory is short")
    a("--shard", choices=SHARDING, default="full", help="FSDP2 over all ranks, within nodes, or replicas")
    a("--dense-attention", action="store_true", help="one L x L mask for a row instead of blocks that see each other")
    a("--no-fused-optimizer", action="store_true", help="AdamW parameter by parameter instead of in one kernel")
    a("--no-onednn", action="store_true", help=NO_ONEDNN)
    a("--hf-tower", action="store_true", help="vision tower: windows one by one, patches by a 3-D convolution")
    a("--no-frozen-shortcut", action="store_true", help="the output head's logits again in the backward pass")
    a("--no-fused-projections", action="store_true", help="rollouts: q, k, v and gate, up by matrix products apart")
    a("--activation-checkpointing", action="store_true", help="recompute activations in the backward pass")
    a("--no-memory-check", action="store_true", help="start even if the estimate says that memory will not do")
    a("--device", choices=("auto", "cpu", "cuda"), default="auto")
    a("--threads", type=int, default=0, help="CPU threads, 0 = PyTorch's choice")
    a("--workers", type=int, default=2, help="processes that prepare the next images, per rank; 0 = the loop does")
    a("--cache-gb", type=float, default=4.0, help="memory for frozen vision features, per rank")
    a("--save-every", type=int, default=save_every, help="steps between checkpoints, 0 = only at the end")
    a("--save-minutes", type=float, default=30.0, help="minutes between checkpoints, besides --save-every; 0 = none")
    a("--keep-checkpoints", type=int, default=2, help="how many of the newest stay, besides that of the best score")
    a("--stop-after", type=int, default=0, help="stop after this many steps of this run's total, checkpoint kept")
    b = p.add_argument_group("when something goes wrong (docs/reliability.md)").add_argument
    b(
        "--on-bad-image",
        choices=BAD_IMAGE,
        default="stop",
        help="skip: the next record takes its place, and it is counted",
    )
    b(
        "--max-skipped",
        type=int,
        default=3,
        help="stop after this many steps in a row with a loss or gradient not finite",
    )
    b("--slow-minutes", type=float, default=5.0, help="name the rank that is waited for after this long; 0 = never")
    b(
        "--hang-minutes",
        type=float,
        default=30.0,
        help="end the run (exit code 3) after this long in a stage; 0 = never",
    )
    return a


TOKENS = "tokens"  # in the run folder, if not elsewhere by --token-cache

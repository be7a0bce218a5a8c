"""Named sets of loss and advantage flags for `train_grpo.py --algorithm NAME`, each with its source.

Every set gives a value to every flag of LOSS_FLAGS, under the flag's name in `train_grpo.py`; flags on the command line
win over the set. What a method does besides its loss and advantages stands in NOT_HERE: a name is not a promise that
all of a paper is reproduced.
"""

KL_REFERENCES = ("sft", "base", "old", "none")

LOSS_FLAGS = (
    "no_advantage_std",
    "clip_eps",
    "clip_eps_high",
    "beta",
    "kl_estimator",
    "kl_reference",
    "loss_average",
    "ratio_level",
)

_EQUATION_2 = dict(
    no_advantage_std=False,
    clip_eps=0.2,
    clip_eps_high=None,
    beta=0.04,
    kl_estimator="k3",
    kl_reference="sft",
    loss_average="sequence",
    ratio_level="token",
)

ALGORITHMS: dict[str, dict] = {
    # Eq. 2 of arXiv 2602.18763 as we read it, and the defaults of train_grpo.py. To the letter the equation differs
    # twice: it calls pi_old the reference policy, under which the KL term and its gradient vanish at the first inner
    # update, and it can be read as one ratio a sequence. That reading is `--algorithm paper --kl-reference old
    # --ratio-level sequence`; with one update a step it trains without any KL, and its ratio level changes nothing.
    "paper": _EQUATION_2,
    # Eq. 3 and 4 of arXiv 2402.03300 with beta from its section 4.2; the reference is the initial, i.e. the SFT model.
    # The same flags as `paper` on purpose: the paper's Eq. 2 is this objective. The paper gives no clip range; 0.2 is
    # PPO's (arXiv 1707.06347).
    "deepseekmath": _EQUATION_2,
    # verl's defaults for GRPO: docs/algo/grpo.md and verl/trainer/config/actor/actor.yaml (loss_agg_mode token-mean,
    # use_kl_loss with kl_loss_coef 0.001 and low_var_kl, clip_ratio 0.2). With LoRA its reference is the actor with
    # the adapter switched off, also when training starts from an SFT adapter (ray_trainer.py, compute_ref_log_prob):
    # the KL is to the base model.
    "verl": _EQUATION_2 | dict(beta=0.001, kl_reference="base", loss_average="token"),
    # arXiv 2503.20783: no division by the std, none by the completion's length, no KL.
    "drgrpo": _EQUATION_2 | dict(no_advantage_std=True, beta=0.0, kl_reference="none", loss_average="constant"),
    # arXiv 2503.14476: clip-higher, mean over all tokens, no KL.
    "dapo": _EQUATION_2 | dict(clip_eps_high=0.28, beta=0.0, kl_reference="none", loss_average="token"),
}

SOURCES = {
    "paper": "arXiv 2602.18763, Eq. 2",
    "deepseekmath": "arXiv 2402.03300, Eq. 3-4",
    "verl": "verl docs/algo/grpo.md, actor.yaml",
    "drgrpo": "arXiv 2503.20783",
    "dapo": "arXiv 2503.14476",
}

NOT_HERE = {
    "paper": "",
    "deepseekmath": "64 completions a question and 1024 a step; process rewards; a reference that moves (iterative)",
    "verl": "dual clip (ratio at most 3 when A < 0); k3 clamped to [-10, 10]; std + 1e-6",
    "drgrpo": "",
    "dapo": "dynamic sampling (flat groups drawn again); overlong reward shaping",
}


def describe(args: dict) -> str:
    """One line for the start of a run: which algorithm's flags these are, its source, and what was changed by hand.

    args: the run's flags by name, those of LOSS_FLAGS among them; `algorithm` is the one asked for. Without one, the
    set that agrees is named ("paper" for the defaults), else the flags that differ from "paper".
    """
    asked = args.get("algorithm")
    name = asked or next(
        (n for n, flags in ALGORITHMS.items() if all(args[f] == flags[f] for f in LOSS_FLAGS)), "paper"
    )
    changed = [
        f"--{f.replace('_', '-')} {args[f]} ({ALGORITHMS[name][f]})"
        for f in LOSS_FLAGS
        if args[f] != ALGORITHMS[name][f]
    ]
    line = f"algorithm: {name} [{SOURCES[name]}]"
    if changed:
        line += " except " + ", ".join(changed)
    if asked and NOT_HERE[name]:
        line += f"; not part of it here: {NOT_HERE[name]}"
    return line

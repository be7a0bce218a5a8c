"""Named sets of loss and advantage flags for `train_grpo.py --preset NAME`, each with its source.

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

LOSS_PRESETS: dict[str, dict] = {
    # Eq. 2 of arXiv 2602.18763 as we read it, and the defaults of train_grpo.py. To the letter the equation differs
    # twice: it calls pi_old the reference policy, under which the KL term and its gradient vanish at the first inner
    # update, and it can be read as one ratio a sequence. That reading is `--preset paper --kl-reference old
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


def loss_preset(args: dict) -> str:
    """Name of the set that a run's loss flags are, or are closest to in intent: the last one of its `preset` list; else
    the one that agrees with them ("paper" for the defaults), else "paper"."""
    asked = [name for name in _names(args) if name in LOSS_PRESETS]
    agree = [name for name, flags in LOSS_PRESETS.items() if all(args[f] == flags[f] for f in LOSS_FLAGS)]
    return (asked[-1:] or agree or ["paper"])[0]


def describe(args: dict) -> list[str]:
    """What is optimised, in two lines for the start of a run and its run.json: the presets asked for, which set the
    loss flags are, with its source, what was changed by hand and what is missing; then reference, ratio and average.

    args: the run's flags by name, those of LOSS_FLAGS, `preset` and `au_reward` among them.
    """
    names = _names(args)
    name = loss_preset(args)
    line = f"preset: {' '.join(names) or 'none'}; loss: {name} [{SOURCES[name]}]"
    changed = [f for f in LOSS_FLAGS if args[f] != LOSS_PRESETS[name][f]]
    if changed:
        line += " except " + ", ".join(f"--{f.replace('_', '-')} {args[f]} ({LOSS_PRESETS[name][f]})" for f in changed)
    if name in names and NOT_HERE[name]:
        line += f"; not part of it here: {NOT_HERE[name]}"
    no_kl = args["beta"] == 0 or args["kl_reference"] == "none"
    reference = "none, no KL term" if no_kl else f"{args['kl_reference']} (beta {args['beta']}, {args['kl_estimator']})"
    flags = (("ratio", "ratio_level"), ("loss average", "loss_average"), ("AU reward", "au_reward"))
    return [line, "; ".join([f"KL reference: {reference}", *(f"{word}: {args[flag]}" for word, flag in flags)])]


def _names(args: dict) -> list[str]:
    """The presets asked for. A run of an earlier version had one name, not a list."""
    preset = args.get("preset") or []
    return [preset] if isinstance(preset, str) else [str(name) for name in preset]

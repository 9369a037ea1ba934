"""What both fine-tuning stages (`sft`, `rl`) share: the common part of the recipe, the model and how it is spoken to,
TRL's settings, resuming after a stop, and the folder that comes out.

    OUT/recipe.json   every setting, defaults included, and the versions that it was run with
    OUT/trainer/      checkpoints and TensorBoard logs; a run that was stopped resumes from the last checkpoint
    OUT/adapter/      the adapter alone, of a run with train = "lora"
    OUT/policy/       the result: `load_policy("mllm:OUT/policy")`
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import MethodType
from typing import Any, TypeVar

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from torch.nn import functional as F
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils.generic import ModelOutput

from ibisagent import files
from ibisagent.domain import Observation, Wording
from ibisagent.environment import package_version
from ibisagent.errors import ConfigError, PolicyError
from ibisagent.files import one_line
from ibisagent.generation.exports import TRAINING_TEMPLATE
from ibisagent.policies import load_policy
from ibisagent.policies.mllm import MllmPolicy
from ibisagent.protocol import History, Message, OverlayStyle, render
from ibisagent.training.finetune.recipes import StageRecipe
from ibisagent.training.nano.trainer import CHAT_TEMPLATE

RECIPE_NAME = "recipe.json"
FREE_TO_CHANGE = {
    "out",
    "device",
    "dataloader_num_workers",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "report_to",
    "run_name",
}
"""Settings that a run may go on with although they differ."""

Report = Callable[[int, int, Mapping[str, float]], None]
"""Called with the steps done, the steps in all, and what there is to log."""


# ------------------------------------------------------------------------------------------- models and their words

_TEMPLATES = {
    "ibis_nano": CHAT_TEMPLATE,
    "qwen2_vl": TRAINING_TEMPLATE,
    "qwen2_5_vl": TRAINING_TEMPLATE,
    "qwen3_vl": TRAINING_TEMPLATE,
}
_OWN_LOGITS = {"ibis_nano"}  # model types whose logits are more than hidden states times the output layer
_VISION = ("visual", "vision_tower", "vision_model", "vision_encoder", "vision")


@dataclass(frozen=True, eq=False)
class Student:
    """A model that learns, with its processor and what `protocol.render` must know to speak to it."""

    model: Any
    processor: Any
    name: str
    dialect: str
    history: History
    style: OverlayStyle
    wording: Wording | None
    describe: Callable[[], Mapping[str, str]]
    """What it was made from, for the record; reads all weights."""

    @property
    def max_turns(self) -> int | None:
        """The limit of turns that the model states; see `environment.turn_limit`."""
        return getattr(self.model.config, "max_turns", None)

    def told(self, observation: Observation, *, history: History | None = None) -> list[Message]:
        """The conversation that asks the model for its next reply; history None: its own."""
        return render(
            observation, dialect=self.dialect, history=history or self.history, style=self.style, wording=self.wording
        )

    @cached_property
    def reply_start(self) -> str:
        """What the chat template writes before a reply."""
        probe: list[Message] = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
        asked, bare = (self.processor.apply_chat_template(probe, add_generation_prompt=own) for own in (True, False))
        return str(asked[len(bare) :])


def load_student(recipe: StageRecipe, history: History | None) -> Student:
    """The model that `recipe` starts from, on the CPU; history None: as the policy prefers.

    What the result must be asked with (dialect, history, style of masks, chat template, size of images) is written
    into its configuration. ConfigError for a policy that cannot be trained, PolicyError for missing weights.
    """
    dtype = recipe.dtype
    if dtype == "auto":
        dtype = "bfloat16" if torch.cuda.is_available() and recipe.device != "cpu" else "float32"
    policy = load_policy(
        recipe.policy,
        dialect=recipe.dialect,
        history=history,
        device="cpu",  # the trainer moves it to its process's device
        dtype=dtype,
        adapter=recipe.adapter,
        max_pixels=recipe.max_pixels,
        prompts=recipe.prompts,
    )
    if not isinstance(policy, MllmPolicy):
        raise ConfigError(
            f"policy '{recipe.policy}' cannot be trained: give ibis-nano, a folder or a hub id of a model"
        )
    model, processor = policy.parts
    processor.chat_template = _template(recipe, model.config.model_type, processor.chat_template)
    if recipe.max_pixels is not None:
        size = processor.image_processor.size
        low = min(size["shortest_edge"], recipe.max_pixels)
        processor.image_processor.size = {"shortest_edge": low, "longest_edge": recipe.max_pixels}
    config = model.config
    config.dialect, config.history, config.mask_style = policy.dialect, policy.history, policy.style
    config.wording = policy.wording and asdict(policy.wording)
    if recipe.freeze_vision:
        for parameter in _vision_tower(model, policy.name)[1].parameters():
            parameter.requires_grad_(False)
    spoken = (policy.dialect, policy.history, policy.style, policy.wording)
    return Student(model, processor, policy.name, *spoken, policy.describe)


def _template(recipe: StageRecipe, model_type: str, own: str) -> str:
    if recipe.chat_template is not None:
        try:
            return recipe.chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"chat_template {recipe.chat_template}: cannot be read ({error})") from error
    template = _TEMPLATES.get(model_type, own)
    if "generation -%}" not in template and "generation %}" not in template:
        raise ConfigError(
            f"the chat template of {recipe.policy} ({model_type}) does not mark replies with {{% generation %}}:"
            " give one as chat_template, see docs/guide/training.md"
        )
    return template


def _vision_tower(model: nn.Module, name: str) -> tuple[str, nn.Module]:
    """Name and module of the part that sees."""
    for path, module in model.named_modules():
        if path.rpartition(".")[2] in _VISION:
            return path, module
    raise ConfigError(
        f"{name} has no vision tower under a known name ({', '.join(_VISION)}): set freeze_vision = false"
    )


def lora_config(student: Student, recipe: StageRecipe) -> LoraConfig | None:
    """Adapters in every linear layer but the output's and a frozen vision tower's; None without LoRA."""
    if recipe.train != "lora":
        return None
    model = student.model
    frozen = _vision_tower(model, student.name)[0] + "." if recipe.freeze_vision else None
    targets = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not model.get_output_embeddings()
        and not path.endswith("lm_head")
        and not (frozen and path.startswith(frozen))
    ]
    settings = recipe.lora
    return LoraConfig(r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=targets)


# -------------------------------------------------------------------------------- models with logits of their own


@dataclass
class ScoredReplies(ModelOutput):
    """What TRL's trainers want of a model in place of its logits, for each next token, zero where it has no label.

    log_probs, entropy, is_top1, label_mask (B, L - 1). region_logits: as the model gave them.
    """

    loss: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    label_mask: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    region_logits: torch.Tensor | None = None


def score_by_own_logits(student: Student, temperature: float = 1.0, *, as_written: bool = False) -> None:
    """Let TRL score the student's replies by its own logits; call it when the trainer has been made.

    as_written: among the tokens alone that the student allows itself when it writes (`nano.Readable`), so
    that what is learned is the distribution that was sampled from; not for replies that others wrote.

    TRL multiplies hidden states with the output layer instead, to save memory. The places that ibis-nano writes have
    no row in that layer, their logits are read from the image. Models without such logits are left as they are.
    """
    model = student.model
    if model.config.model_type not in _OWN_LOGITS:
        return
    plain_forward = type(model).forward

    def forward(
        self: Any,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,  # TRL's marks of image tokens; the model finds them itself
        labels: torch.Tensor | None = None,
        fused_lm_head: bool = False,
        **kwargs: Any,
    ) -> Any:
        given = {"pixel_values": pixel_values, "attention_mask": attention_mask, **kwargs}
        if not fused_lm_head or labels is None:
            return plain_forward(self, input_ids, labels=labels, **given)
        wanted = labels[:, 1:]
        known = wanted != -100
        output = plain_forward(self, input_ids, scored=F.pad(known, (0, 1)), **{**given, "use_cache": False})
        logits = output.logits.float()
        if as_written and self.readable is not None:
            logits = self.readable.along(input_ids, F.pad(known, (0, 1)), logits)
        log_probs = (logits / temperature).log_softmax(dim=-1)
        chosen = log_probs.gather(1, wanted[known][:, None])[:, 0]
        empty = chosen.new_zeros(known.shape)
        return ScoredReplies(
            log_probs=empty.masked_scatter(known, chosen),
            entropy=empty.masked_scatter(known, torch.special.entr(log_probs.detach().exp()).sum(dim=1)),
            is_top1=torch.zeros_like(known).masked_scatter(known, log_probs.argmax(dim=1) == wanted[known]),
            label_mask=known,
            region_logits=output.region_logits,
        )

    model.forward = MethodType(forward, model)


# ------------------------------------------------------------------------------------------------ TRL's trainers


Config = TypeVar("Config", bound=TrainingArguments)


def trainer_config(kind: type[Config], recipe: StageRecipe, **own: Any) -> Config:
    """TRL's configuration: what all stages set, what a stage sets of its `own`, and the recipe's table [trainer].

    ConfigError for a setting of the table that TRL does not know or that is set here, and for values that TRL refuses.
    """
    settings = _shared_settings(recipe) | own
    known = {field.name for field in fields(kind)}
    for name in recipe.trainer:
        if name in settings:
            raise ConfigError(f"trainer.{name}: is set by this package; use the recipe's own settings for it")
        if name not in known:
            raise ConfigError(f"trainer.{name}: there is no such setting of {kind.__name__}")
    try:
        return kind(**settings, **recipe.trainer)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{kind.__name__} refuses the recipe: {files.one_line(error, 300)}") from error


def _shared_settings(recipe: StageRecipe) -> dict[str, Any]:
    """Arguments that SFTConfig and GRPOConfig share. ConfigError where a logger is not installed."""
    for logger in recipe.report_to:
        if find_spec(logger) is None:
            raise ConfigError(f"report_to = '{logger}' needs the package {logger}: pip install {logger}")
    return {
        "output_dir": str(recipe.out / "trainer"),
        "run_name": recipe.run_name or recipe.out.name,
        "num_train_epochs": recipe.num_train_epochs,
        "max_steps": recipe.max_steps or -1,
        "per_device_train_batch_size": recipe.batch_size,
        "per_device_eval_batch_size": recipe.batch_size,
        "gradient_accumulation_steps": recipe.gradient_accumulation_steps,
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": recipe.lr_scheduler_type,
        "warmup_steps": recipe.warmup_steps,
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": recipe.max_grad_norm,
        "bf16": recipe.autocast == "bfloat16",
        "activation_checkpointing": recipe.activation_checkpointing,
        "dataloader_num_workers": recipe.dataloader_num_workers,
        "dataloader_pin_memory": torch.cuda.is_available(),
        # transformers allows bfloat16 on a CPU only where it is told to use it
        "use_cpu": recipe.device == "cpu" or not torch.accelerator.is_available(),
        "seed": recipe.seed,
        "logging_steps": recipe.logging_steps,
        "save_steps": recipe.save_steps,
        "save_total_limit": recipe.save_total_limit,
        "report_to": list(recipe.report_to),
        "remove_unused_columns": False,
        "disable_tqdm": True,
    }


class LogCallback(TrainerCallback):
    """Hands what the trainer logs to a `Report`, and keeps it off the screen otherwise."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """See `TrainerCallback`."""
        if state.is_world_process_zero:
            numbers = {name: float(value) for name, value in (logs or {}).items() if isinstance(value, int | float)}
            self._report(state.global_step, state.max_steps, numbers)


@contextmanager
def without_library_warnings() -> Iterator[None]:
    """Silence what TRL and transformers warn each other of, and what is experimental in TRL: nobody here can act."""
    with warnings.catch_warnings():
        for message in (r"`(is_)?gradient_checkpointing\w*` is deprecated", "You are using 'environment_factory'"):
            warnings.filterwarnings("ignore", message=message)
        yield


@without_library_warnings()
def run(trainer: Trainer, student: Student, recipe: StageRecipe, stage: str) -> Path:
    """Train, resuming from the last checkpoint if there is one, and write the result; returns OUT/policy,
    or OUT/adapter where that is not merged.

    ConfigError if OUT holds a run of another recipe.
    """
    claim(student, recipe, stage, write=trainer.is_world_process_zero())
    trainer.remove_callback(PrinterCallback)  # `LogCallback` gets what it prints
    checkpoints = recipe.out / "trainer"
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None)
    return save_result(trainer, student, recipe)


def claim(student: Student, recipe: StageRecipe, stage: str, *, write: bool) -> None:
    """Write OUT/recipe.json, or check that the one there says the same."""
    packages = ("trl", "transformers", "torch", "peft", "accelerate")
    made_with = {
        "started_from": dict(student.describe()) if write else {},
        "versions": {"ibisagent": package_version(), **{name: version(name) for name in packages}},
    }
    facts = {"stage": stage, "recipe": recipe.model_dump(mode="json")}
    files.claim(recipe.out / RECIPE_NAME, facts, free=FREE_TO_CHANGE, notes=made_with, write=write)


def save_result(trainer: Trainer, student: Student, recipe: StageRecipe) -> Path:
    """Write OUT/policy (and OUT/adapter), each whole or not at all; returns the one to use. Every process of a run must
    call it."""
    first = trainer.is_world_process_zero()
    student.processor.tokenizer.response_template = None  # TRL's, not the policy's
    kind = "policy" if recipe.train == "full" else "adapter"
    _replace(recipe.out / kind, lambda folder: trainer.save_model(str(folder)), first)
    trainer.accelerator.wait_for_everyone()
    if not recipe.merge and kind == "adapter":
        return recipe.out / kind
    if kind == "adapter" and first:
        _merge_in_a_process_of_its_own(recipe, student.history)
    trainer.accelerator.wait_for_everyone()
    return recipe.out / "policy"


def _merge_in_a_process_of_its_own(recipe: StageRecipe, history: History) -> None:
    """Write OUT/policy from the start and OUT/adapter.

    A process of a distributed run cannot load weights alone: under ZeRO-3 loading is collective, and the others wait.
    """
    distributed = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_",
        "GROUP_",
        "ROLE_",
        "MASTER_",
        "TORCHELASTIC_",
        "ACCELERATE_",
        "FSDP_",
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(distributed)}
    shared = recipe.model_dump_json(include=set(StageRecipe.model_fields))
    command = [sys.executable, "-P", "-m", "ibisagent.training.finetune.merge", shared, history]
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        why = one_line((done.stderr.strip().splitlines() or ["no reason given"])[-1], 300)
        raise PolicyError(
            f"{recipe.out / 'adapter'}: cannot be merged into {recipe.policy} ({why}); the adapter is whole"
        )


def merge(recipe: StageRecipe, history: History) -> Path:
    """Write OUT/policy from what `recipe` starts from and OUT/adapter; returns the folder. On the CPU."""
    student = load_student(recipe, history)
    merged = PeftModel.from_pretrained(student.model, str(recipe.out / "adapter"))

    def save(folder: Path) -> None:
        merged.merge_and_unload().save_pretrained(folder)
        student.processor.save_pretrained(folder)

    _replace(recipe.out / "policy", save, first=True)
    return recipe.out / "policy"


def _replace(folder: Path, save: Callable[[Path], object], first: bool) -> None:
    """Let `save` fill a folder that takes the place of `folder` when it is complete."""
    fresh = folder.with_name(f".{folder.name}.part")
    if first:
        shutil.rmtree(fresh, ignore_errors=True)
    save(fresh)
    if first:
        (fresh / "training_args.bin").unlink(missing_ok=True)  # a pickle
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)

"""How a prune stage goes on its schedule: each step makes a model that is kept, for a run that goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hfcompress.context import StageContext, StageResult
from hfcompress.data.texts import texts_of
from hfcompress.distillation.engine import train_student
from hfcompress.distillation.recovery import Recover
from hfcompress.models.artifact import Artifact, load_model, load_tokenizer, save_model
from hfcompress.models.shape import Shape, shape_of
from hfcompress.pruning.criteria.base import LearnedCriterion
from hfcompress.pruning.schedules import Gradual, Iterative, Lottery
from hfcompress.pruning.select import Cutting
from hfcompress.training.checkpoints import is_sealed, seal
from hfcompress.utils.distributed import agreed, on_main_process, process_state
from hfcompress.utils.files import new_directory
from hfcompress.utils.logging import log

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hfcompress.pruning.stage import Prune
    from hfcompress.training.overlay import TrainingOverlay


FACTS = "facts.json"
"""Beside a model that is kept on the way: what stage.json will say of it, and which layers are left."""


@dataclass
class Pruning:
    """One run of a prune stage.

    Attributes:
        options: The stage.
        shape: The model's as the stage gets it.
        parent: That model.
        context: The stage's context.
    """

    options: Prune
    shape: Shape
    parent: Artifact
    context: StageContext

    def __post_init__(self) -> None:
        self.tokenizer = load_tokenizer(self.parent.path, self.context.task)

    @property
    def facts(self) -> dict[str, Any]:
        """What was found so far, for stage.json and the card."""
        return self.cutting.facts

    def run(self) -> StageResult:
        """Cuts and trains as the schedule says, and saves."""
        schedule = self.options.schedule
        if isinstance(schedule, Lottery):
            model = self._lottery(schedule)
        elif isinstance(schedule, Iterative):
            model = self._rounds(schedule.shares)
        else:
            ends_in_training = isinstance(schedule, Gradual) or self.options.criterion.learned
            model = self._recovered(self._under_masks() if ends_in_training else self._cut("parent", 1.0, "cut"), "")
        self._note(model)
        return self.context.finish(model, self.tokenizer, self.facts)

    def _rounds(self, shares: Sequence[float]) -> PreTrainedModel:
        last = "parent"
        for number, share in enumerate(shares[:-1], start=1):
            name = f"round-{number}"
            if not self._made(name):
                log.info(f"prune: round {number} of {len(shares)}, {share:.0%} of the cutting")
                self._keep(name, self._recovered(self._cut(last, share, f"cut-{number}"), f"train-{number}"))
            last = name
        log.info(f"prune: round {len(shares)} of {len(shares)}")
        return self._recovered(self._cut(last, 1.0, "cut"), "")

    def _lottery(self, schedule: Lottery) -> PreTrainedModel:
        train = self.options.train
        assert train is not None
        if not self._made("ticket-0"):
            early = self._load("parent")
            if schedule.rewind_steps:
                log.info(f"prune: {schedule.rewind_steps} steps, to the weights that every round goes back to")
                early = self._trained(early, train.until(schedule.rewind_steps), "early")
            self._keep("ticket-0", early)
        for number, share in enumerate(schedule.shares, start=1):
            if self._made(f"ticket-{number}"):
                continue
            log.info(f"prune: lottery round {number} of {schedule.rounds}, {share:.0%} of the cutting")
            ticket = self._load(f"ticket-{number - 1}")
            trained = self._trained(self._load(f"ticket-{number - 1}"), train, f"train-{number}")
            for change in self.cutting.decided(trained, share)[1]:
                ticket = change(ticket)
            self._keep(f"ticket-{number}", self._with_words(ticket, share))
        return self._trained(self._load(f"ticket-{schedule.rounds}"), train, "")

    def _under_masks(self) -> PreTrainedModel:
        """The model trained under masks, and cut to what they came to."""
        from hfcompress.models.surgery import cut

        train = self.options.train
        assert train is not None
        if not self._made("cut"):
            model = self._load("parent")
            masks = self._masks(model)
            model = self._trained(model, train, "masked", masks)
            masks.settle(model)
            small = model if self.options.weights else cut(model, masks.keep())
            self._keep("cut", self._with_words(small, 1.0))
        return self._load("cut")

    def _masks(self, model: PreTrainedModel) -> TrainingOverlay:
        criterion, schedule, pattern = self.options.criterion, self.options.schedule, self.options.weights
        if isinstance(schedule, Gradual):
            return self.cutting.closing(schedule, model)
        assert isinstance(criterion, LearnedCriterion)
        if pattern is not None:
            return criterion.weight_masks(model, pattern)
        return criterion.masks(model, self.cutting.target(model, 1.0))

    def _cut(self, start: str, share: float, name: str) -> PreTrainedModel:
        """What a model becomes when so much of the cutting is done."""
        if not self._made(name):
            model, _ = self.cutting.decided(self._load(start), share)
            self._keep(name, self._with_words(model, share))
        return self._load(name)

    def _with_words(self, model: PreTrainedModel, share: float) -> PreTrainedModel:
        """The model with the words of its corpus alone, and factored, where the stage says so, once all is cut."""
        from hfcompress.models.factorized_embeddings import factor_embeddings, token_counts
        from hfcompress.models.vocabulary import prune_vocabulary, select_tokens

        if share < 1:
            return model
        if self.options.vocabulary == "corpus":
            splits, before = [self.context.rows("train"), self.context.rows("dev")], len(self.tokenizer)
            self.tokenizer, ids = prune_vocabulary(self.tokenizer, texts_of(splits, self.context.task.text))
            self.facts["vocabulary"] = [len(ids), before]
            log.info(f"prune: {len(ids):,} of {before:,} tokens stay")
            model = select_tokens(model, ids, self.tokenizer)
        if self.options.embedding_rank:
            texts = texts_of([self.context.rows("train")], self.context.task.text)
            model, kept = factor_embeddings(model, self.options.embedding_rank, token_counts(self.tokenizer, texts))
            self.facts["embedding_rank"] = {"rank": self.options.embedding_rank, "kept": round(kept, 6)}
            log.info(f"prune: word embeddings of rank {self.options.embedding_rank} keep {kept:.1%} of their squares")
        return model

    def _recovered(self, model: PreTrainedModel, name: str) -> PreTrainedModel:
        recover = self.options.recover
        return self._trained(model, recover, name) if recover else model

    def _trained(
        self, model: PreTrainedModel, training: Recover, name: str, masks: TrainingOverlay | None = None
    ) -> PreTrainedModel:
        """The model after a training, which keeps its checkpoints in a directory of this name; its zeros stay zero."""
        from hfcompress.pruning.sparsity import KeptZeros
        from hfcompress.training.lora import add_lora, merge_adapters

        if masks is None and self.options.weights:
            masks = KeptZeros(model)
        context = self.context.at(name) if name else self.context
        if training.lora:
            add_lora(model, training.lora)
        found = train_student(model, training, training, self.parent, context, self.tokenizer, masks=masks)
        self.facts.update(found)
        return merge_adapters(model) if training.lora else model

    def _made(self, name: str) -> bool:
        """Whether a step was done before; the first process says it, so that all of them go the same way."""
        return bool(agreed(is_sealed(place := self.context.directory / name) and (place / FACTS).is_file()))

    def _load(self, name: str) -> PreTrainedModel:
        """A model that was kept; what was noted and decided until then is known again."""
        path = self.parent.path if name == "parent" else self.context.directory / name
        if name != "parent":
            facts = json.loads((path / FACTS).read_text(encoding="utf-8"))
            self.facts.update(facts["notes"])
            self.cutting.kept_layers = facts["layers"]
        self.tokenizer = load_tokenizer(path, self.context.task)
        return load_model(path, self.context.task.auto_class).to(process_state().device)

    def _keep(self, name: str, model: PreTrainedModel) -> None:
        """Keeps a model with all that was noted and decided until then: a run that was killed goes on from both."""

        def save() -> None:
            with new_directory(self.context.directory / name) as scratch:
                save_model(model.cpu(), self.tokenizer, scratch)
                facts = {"notes": self.facts, "layers": self.cutting.kept_layers}
                (scratch / FACTS).write_text(json.dumps(facts), encoding="utf-8")
                seal(scratch)

        on_main_process(save)

    @cached_property
    def cutting(self) -> Cutting:
        """What decides; it reads the data with the tokenizer that the stage starts with."""
        return Cutting(self.options, self.shape, self.parent, self.context)

    def _note(self, model: PreTrainedModel) -> None:
        """What stayed, for stage.json and the card."""
        notes, final = self.facts, shape_of(model.config.to_dict())
        layers = self.cutting.kept_layers
        before = [self.shape.layers[number - 1] for number in layers]
        kept: dict[str, Any] = {
            "heads": [[new.heads, old.heads] for new, old in zip(final.layers, before, strict=True)],
            "ffn": [[new.ffn, old.ffn] for new, old in zip(final.layers, before, strict=True)],
            "hidden": [final.hidden, self.shape.hidden],
            "layers": {"kept": layers, "of": len(self.shape.layers)},
        }
        notes["kept"] = kept
        latency = self.cutting.latency(model)
        if latency:
            notes["latency"] = latency
        if self.options.weights:
            notes["sparsity"] = self.cutting.sparsity(model)

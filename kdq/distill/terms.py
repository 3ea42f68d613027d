"""Several methods at once: the cross-entropy, once, and the terms of each."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from kdq.distill.checkpoint import Network
from kdq.distill.learner import Learner
from kdq.distill.options import number
from kdq.distill.progress import TrainingProgress
from kdq.distill.teacher_student import Outputs, TeacherStudent
from kdq.utils.calls import parameters
from kdq.utils.checks import one_of, within
from kdq.utils.errors import KdqError
from kdq.utils.names import STABLE

#: A method that has one of these of its own is more than its terms.
BEYOND_TERMS = ("losses", "product", "on_train_epoch_start", "configure_optimizers")


class Terms(TeacherStudent):
    """``ce CE + sum_methods terms(method)``: one pass through the student and one through the teacher.

    >>> from kdq.models import CifarResNet
    >>> student, teacher = (CifarResNet(depth, num_classes=10) for depth in (8, 14))
    >>> terms = {"at": {"weight": 500.0}, "vkd": {"alpha": 1.0, "weight": 2.0}}  # CE + 500 AT + 2 T^2 KL
    >>> module = Terms(student, teacher=teacher, num_classes=10, terms=terms)
    >>> module.methods["at"].weight, module.factors["vkd"]
    (500.0, 2.0)

    Args:
        terms: of each method, by its name, its own options. ``weight`` is the method's own where it has one, or else a
            factor of its terms. A method of another key, or of one's own, is said by ``_target_``; ``name`` is what its
            terms are logged under. The share that a method leaves to the labels (1 - alpha of vkd) does not count.
    """

    ce: float = number(1.0)  # weight of the cross-entropy
    methods: Mapping[str, TeacherStudent]

    def __init__(
        self,
        student: Network,
        teacher: nn.Module | None = None,
        *,
        terms: Mapping[str, Mapping[str, Any]],
        **options: Any,
    ) -> None:
        for option, default in (("temperature", 4.0), ("standardize", False)):
            if options.get(option, default) != default:
                raise KdqError(f"method.{option} is an option of each method: method.terms.NAME.{option}")
        super().__init__(student, teacher, **options)
        self.ce_weight = self.ce
        self.factors: dict[str, float] = {}
        methods: dict[str, TeacherStudent] = {}
        for key, given in terms.items():
            kind, own = method_of(key, given)
            name = own.pop("name", key)
            factor = 1.0 if "weight" in (parameters(kind) or ()) else own.pop("weight", 1.0)
            self.factors[name] = within(f"method.terms.{key}.weight", factor, 0)
            methods[name] = kind(self.student.network, teacher, num_classes=self.num_classes, seed=self.seed, **own)
            del methods[name].student  # theirs is this module's, which no state dict holds twice
            object.__setattr__(methods[name], "student", self.student)
        if len(methods) < max(1, len(terms)):
            raise KdqError("method.terms needs a method, each of another name: +method@method.terms.at=at")
        self.indexed = any(method.indexed for method in methods.values())
        self.looks_inside = any(method.looks_inside for method in methods.values())
        self.methods = nn.ModuleDict(methods)  # type: ignore[assignment]

    def watches(self, role: str) -> Iterable[str]:
        return dict.fromkeys(name for method in self.methods.values() for name in method.watches(role))

    def added(
        self, student: Outputs, teacher: Outputs, labels: Tensor, progress: TrainingProgress
    ) -> dict[str, Tensor]:
        return {
            f"{name}_{term}": self.factors[name] * value
            for name, method in self.methods.items()
            for term, value in method.added(student, teacher, labels, progress).items()
        }

    def setup(self, stage: str) -> None:
        super().setup(stage)
        for method in self.methods.values():
            method.trainer = self.trainer
            method.setup(stage)

    def trained_parameters(self, learner: Learner) -> Iterator[nn.Parameter]:
        parts = (method.trained_parameters(learner) for method in self.methods.values())
        yield from dict.fromkeys([*super().trained_parameters(learner), *(each for part in parts for each in part)])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["terms"] = {name: {self.CHECKPOINT_HYPER_PARAMS_KEY: {}} for name in self.methods}
        for name, method in self.methods.items():
            method.on_save_checkpoint(checkpoint["terms"][name])
            del checkpoint["terms"][name][self.CHECKPOINT_HYPER_PARAMS_KEY]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name, method in self.methods.items():
            start = f"methods.{name}."
            own = {key.removeprefix(start): v for key, v in checkpoint["state_dict"].items() if key.startswith(start)}
            method.on_load_checkpoint({**checkpoint["terms"][name], "state_dict": own})


def method_of(key: str, given: Mapping[str, Any]) -> tuple[type[TeacherStudent], dict[str, Any]]:
    """The class of an entry of ``terms``, and its other options. A class of one's own must be imported already: a
    checkpoint names classes, and reading one must import nothing.
    """
    options = dict(given)
    target, kinds, waiting = options.pop("_target_", key), {}, [TeacherStudent]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        path = f"{kind.__module__}.{kind.__qualname__}"
        only_terms = all(getattr(kind, name) is getattr(TeacherStudent, name) for name in BEYOND_TERMS)
        if only_terms and kind not in (TeacherStudent, Terms):
            kinds[STABLE.get(path, path)] = kind
    return kinds[one_of(f"method.terms.{key}", STABLE.get(target, target), sorted(kinds))], options

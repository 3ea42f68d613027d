"""How a student learns: pure losses, one LightningModule a method over them, and the configuration all share.

Each module stands alone in a plain script; :mod:`kdq.distill.module` opens with one.
"""

from kdq.distill.config import TrainConfig
from kdq.distill.cross_entropy import CrossEntropy
from kdq.distill.dkd import DKD
from kdq.distill.dml import DML
from kdq.distill.mixup import Mixup
from kdq.distill.module import DistillationModule
from kdq.distill.teacher_student import TeacherStudent
from kdq.distill.vkd import VKD

__all__ = ["DKD", "DML", "VKD", "CrossEntropy", "DistillationModule", "Mixup", "TeacherStudent", "TrainConfig"]

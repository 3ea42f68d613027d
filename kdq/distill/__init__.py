"""How a student learns: pure losses, one LightningModule a method over them, and the configuration all share.

Each module stands alone in a plain script; :mod:`kdq.distill.module` opens with one.
"""

from kdq.distill.at import AT
from kdq.distill.byot import BYOT
from kdq.distill.config import TrainConfig
from kdq.distill.crd import CRD
from kdq.distill.cross_entropy import CrossEntropy
from kdq.distill.ctkd import CTKD
from kdq.distill.dist import DIST
from kdq.distill.dkd import DKD
from kdq.distill.dml import DML
from kdq.distill.features import FeatureMethod
from kdq.distill.fitnets import FitNets
from kdq.distill.mixup import Mixup
from kdq.distill.mlkd import MLKD
from kdq.distill.module import DistillationModule
from kdq.distill.nkd import NKD
from kdq.distill.nst import NST
from kdq.distill.ofd import OFD
from kdq.distill.pkt import PKT
from kdq.distill.qad import QAD, QAT
from kdq.distill.reviewkd import ReviewKD
from kdq.distill.rkd import RKD
from kdq.distill.rld import RLD
from kdq.distill.simkd import SimKD
from kdq.distill.sp import SP
from kdq.distill.teacher_student import TeacherStudent
from kdq.distill.terms import Terms
from kdq.distill.tfkd import TfKD
from kdq.distill.ttm import TTM
from kdq.distill.vid import VID
from kdq.distill.vkd import VKD

__all__ = [
    "AT",
    "BYOT",
    "CRD",
    "CTKD",
    "DIST",
    "DKD",
    "DML",
    "MLKD",
    "NKD",
    "NST",
    "OFD",
    "PKT",
    "QAD",
    "QAT",
    "RKD",
    "RLD",
    "SP",
    "TTM",
    "VID",
    "VKD",
    "CrossEntropy",
    "DistillationModule",
    "FeatureMethod",
    "FitNets",
    "Mixup",
    "ReviewKD",
    "SimKD",
    "TeacherStudent",
    "Terms",
    "TfKD",
    "TrainConfig",
]

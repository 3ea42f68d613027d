"""How a student learns: pure losses, one LightningModule a method over them, and the configuration all share.

Each module stands alone in a plain script; :mod:`kdq.distill.module` opens with one.
"""

from kdq.distill.at import AT as AT
from kdq.distill.byot import BYOT as BYOT
from kdq.distill.config import TrainConfig as TrainConfig
from kdq.distill.crd import CRD as CRD
from kdq.distill.cross_entropy import CrossEntropy as CrossEntropy
from kdq.distill.ctkd import CTKD as CTKD
from kdq.distill.dist import DIST as DIST
from kdq.distill.dkd import DKD as DKD
from kdq.distill.dml import DML as DML
from kdq.distill.features import FeatureMethod as FeatureMethod
from kdq.distill.fitnets import FitNets as FitNets
from kdq.distill.mixup import Mixup as Mixup
from kdq.distill.mlkd import MLKD as MLKD
from kdq.distill.module import DistillationModule as DistillationModule
from kdq.distill.nkd import NKD as NKD
from kdq.distill.nst import NST as NST
from kdq.distill.ofd import OFD as OFD
from kdq.distill.pkt import PKT as PKT
from kdq.distill.qad import QAD as QAD
from kdq.distill.qad import QAT as QAT
from kdq.distill.reviewkd import ReviewKD as ReviewKD
from kdq.distill.rkd import RKD as RKD
from kdq.distill.rld import RLD as RLD
from kdq.distill.simkd import SimKD as SimKD
from kdq.distill.sp import SP as SP
from kdq.distill.teacher_student import TeacherStudent as TeacherStudent
from kdq.distill.terms import Terms as Terms
from kdq.distill.tfkd import TfKD as TfKD
from kdq.distill.ttm import TTM as TTM
from kdq.distill.vid import VID as VID
from kdq.distill.vkd import VKD as VKD

from vlmfix.decoders import DECODERS as DECODERS
from vlmfix.decoders import Decoder as Decoder
from vlmfix.decoders import parse as parse
from vlmfix.errors import VlmfixError as VlmfixError
from vlmfix.generation import VLM as VLM
from vlmfix.generation import Answer as Answer
from vlmfix.generation import load as load
from vlmfix.generation import wrap as wrap
from vlmfix.heads.measure import profile as profile
from vlmfix.heads.profile import HeadProfile as HeadProfile
from vlmfix.models.layout import Turn as Turn

__version__: str
__all__ = [
    "DECODERS",
    "VLM",
    "Answer",
    "Decoder",
    "HeadProfile",
    "Turn",
    "VlmfixError",
    "__version__",
    "load",
    "parse",
    "profile",
    "wrap",
]

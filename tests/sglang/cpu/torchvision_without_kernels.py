"""Makes the published torchvision importable beside a CPU build of torch.

SGLang imports torchvision at its start, for its image processors. The published build is for CUDA: its compiled operators
do not load beside a CPU torch, and the module that describes their shapes then fails. Nothing here runs such an operator,
so that module is left empty.
"""

import sys
from types import ModuleType

SHAPES = "torchvision._meta_registrations"
sys.modules.setdefault(SHAPES, ModuleType(SHAPES))

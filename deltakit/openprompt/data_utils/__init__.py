"""OpenPrompt's examples and samplers. Its readers of data sets are not here: use `datasets`."""

from deltakit.openprompt.data_utils.data_sampler import FewShotSampler
from deltakit.openprompt.data_utils.utils import InputExample, InputFeatures

__all__ = ["FewShotSampler", "InputExample", "InputFeatures"]

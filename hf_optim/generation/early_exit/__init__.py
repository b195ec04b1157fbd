"""Early exits in generation: tokens that leave at a confident exit, calibrated thresholds, and lossless drafts.

``EarlyExit`` is the setting, in a configuration or as ``hf_optim.generate(early_exit=...)``; ``calibrate`` finds its
threshold for a bound.
"""

from .calibration import GUARANTEES, Bound, calibrate, distinct, outputs
from .calls import EarlyExitOutput
from .classifier import FILE, classifier_of, fit, save_classifier, set_classifier, states_and_labels
from .distances import DISTANCES, edit_distance, rouge_l
from .door import GuaranteeWarning, custom
from .learn_then_test import Tested, binomial_cdf, fixed_sequence, least_examples, nearest_bound, p_value
from .settings import CONFIDENCES, DECAYS, SETTING, Certificate, EarlyExit, set_settings, settings_of
from .stack import Stack, default_layers

__all__ = [
    "CONFIDENCES",
    "DECAYS",
    "DISTANCES",
    "FILE",
    "GUARANTEES",
    "SETTING",
    "Bound",
    "Certificate",
    "EarlyExit",
    "EarlyExitOutput",
    "GuaranteeWarning",
    "Stack",
    "Tested",
    "binomial_cdf",
    "calibrate",
    "classifier_of",
    "custom",
    "default_layers",
    "distinct",
    "edit_distance",
    "fit",
    "fixed_sequence",
    "least_examples",
    "nearest_bound",
    "outputs",
    "p_value",
    "rouge_l",
    "save_classifier",
    "set_classifier",
    "set_settings",
    "settings_of",
    "states_and_labels",
]

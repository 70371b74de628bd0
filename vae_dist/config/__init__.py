"""Config: the schema of every knob, loading it from YAML and the command line, and its checks."""

from vae_dist.config.errors import ConfigError
from vae_dist.config.keys import changed_numbers, flatten, help_text
from vae_dist.config.load import from_yaml, load_command, load_train_config, to_yaml, wants_help

__all__ = [
    "ConfigError",
    "changed_numbers",
    "flatten",
    "from_yaml",
    "help_text",
    "load_command",
    "load_train_config",
    "to_yaml",
    "wants_help",
]

from mos_cli.utils.deferred import defer
from mos_cli.utils.xformers_runtime import load_xformers_runtime

# Its modules import diffusers, which imports xformers, and bitsandbytes, which few runs use and which takes a second.
load_xformers_runtime()
defer("bitsandbytes")

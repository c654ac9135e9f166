from mos_cli.utils.xformers_runtime import load_xformers_runtime

# Its modules import diffusers, which imports xformers.
load_xformers_runtime()

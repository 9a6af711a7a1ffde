"""A checkpoint of a real model's size with random weights: the names, shapes, type and shards that the real one has.

python -m suture.models.random_checkpoint --preset qwen-7b --out DIR [--layers N] [--dtype bfloat16] [--seed 0] [--empty]
"""

import time
from pathlib import Path

from suture.core import arguments
from suture.core.command import CommandParser, given, run
from suture.models.named import preset_path, presets, read_config


def main() -> None:
    parser = CommandParser(
        prog="random_checkpoint", description="Write a checkpoint of a real model's size with random weights."
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--preset", choices=presets(), metavar="NAME", help=f"a model's dimensions: {', '.join(presets())}")
    source.add_argument("--config", metavar="FILE", type=Path, help="another model's config.json")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True)
    parser.add_argument("--layers", type=arguments.whole(1, arguments.LAYERS), help="instead of as many as the model has")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="(%(default)s)")
    parser.add_argument("--seed", type=arguments.seed, default=0, help="(%(default)s)")
    parser.add_argument("--empty", action="store_true", help="holes instead of values: enough to export, takes no room")
    options = parser.parse_args()
    if options.empty and given(options, "seed"):
        parser.error("--seed says nothing with --empty, which draws nothing; leave one out")
    config = read_config(options.config or preset_path(options.preset), options.layers)
    from suture.models.random_weights import write, write_networks  # only now: torch takes seconds

    started = time.monotonic()
    if "networks" in config:
        if options.layers is not None:
            parser.error("--layers says nothing of a model of several networks; leave it out")
        size = write_networks(config, options.out, options.dtype, None if options.empty else options.seed)
        print(f"random_checkpoint: {size:,} bytes in {time.monotonic() - started:.1f} s → {options.out}")
        return
    size, shards = write(config, options.out, options.dtype, None if options.empty else options.seed)
    seconds = time.monotonic() - started
    print(f"random_checkpoint: {size:,} bytes in {shards} files in {seconds:.1f} s → {options.out}")


if __name__ == "__main__":
    run("random_checkpoint", main)

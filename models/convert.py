"""suture convert FILE OUT: a published pickle to safetensors; suture.models.pickles does it."""

from pathlib import Path

from suture.core.command import DONE, CommandParser, run


def main(arguments: list[str] | None = None, prog: str = "convert") -> int:
    parser = CommandParser(
        prog=prog, description="Convert a published .pth, .bin or .ckpt file to safetensors; no code of it runs."
    )
    parser.add_argument("file", metavar="FILE", type=Path)
    parser.add_argument(
        "out", metavar="OUT", type=Path, help="a folder, for model.safetensors, or the name of a .safetensors file"
    )
    parser.add_argument(
        "--like",
        metavar="FOLDER|PRESET",
        help="of Stable Diffusion or a ControlNet in one file: whose config.json its networks get",
    )
    options = parser.parse_args(arguments)
    if options.like is not None:
        from suture.models.single_file import convert_single_file

        folders = convert_single_file(options.file, options.out, options.like)
        print(f"convert: {options.file} → {', '.join(map(str, folders))}")
        return DONE
    from suture.models.pickles import convert  # only now: torch takes seconds

    names, left_out = convert(options.file, options.out)
    if left_out:
        print(f"convert: left out, as they are not the model's weights: {', '.join(left_out[:5])}{' …' * (len(left_out) > 5)}")
    print(f"convert: {options.file} → {', '.join(map(str, names))}")
    return DONE


if __name__ == "__main__":
    run("convert", main)

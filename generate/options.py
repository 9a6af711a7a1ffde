"""What generate's command line takes. Imports nothing heavy, so that --help and wrong arguments answer at once."""

import argparse
from pathlib import Path

from suture.core.arguments import box, count, frames, point, real, rows, seed, size, whole
from suture.core.command import CommandParser, given
from suture.core.parts import find_parts
from suture.core.pictures import answers_about_pictures

DRAWING = ("negative", "control", "steps", "guidance", "size")
WRITING = (
    "audio",
    "chat",
    "system",
    "language",
    "translate",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
    "max_tokens",
    "stop",
    "results",
)


def parse(arguments: list[str] | None = None, prog: str = "generate") -> argparse.Namespace:
    parser = CommandParser(prog=prog, description="Continue text, answer, converse, or draw, with what a pipeline has made.")
    parser.add_argument("out", metavar="OUT", type=Path, help="a pipeline's folder, or one of its graphs")
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--prompt", metavar="TEXT", help="text to continue")
    asked.add_argument("--prompts", metavar="FILE", type=Path, help="prompts, one a line, or JSON objects in a .jsonl file: "
                       '{"prompt": ...} or {"messages": [...]}; results are JSON lines in the same order')  # fmt: skip
    asked.add_argument("--audio", metavar="FILE.wav", type=Path, help="speech to write down, for Whisper")
    parser.add_argument("--chat", action="store_true", help="prompts are what a user says, put into the checkpoint's chat "
                        "template; without a prompt, a conversation by lines of standard input")  # fmt: skip
    parser.add_argument("--system", metavar="TEXT", help="with --chat: the system's message")

    parser.add_argument("--language", metavar="CODE", help="with --audio: what is spoken, as in en (default: what is heard)")
    parser.add_argument("--translate", action="store_true", help="with --audio: write it in English")

    drawing = parser.add_argument_group("pictures, of a model that makes them")
    drawing.add_argument(
        "--picture",
        metavar="FILE.png",
        type=Path,
        action="append",
        default=[],
        help="where it goes (with --prompts FILE-1.png, ...); with --mask, and of a model that answers about pictures: what is looked at "
        "(may be repeated)",
    )
    drawing.add_argument("--negative", metavar="TEXT", help="what the picture is not to show")
    drawing.add_argument("--control", metavar="FILE.png", type=Path, help="what the ControlNet is shown, such as edges")
    drawing.add_argument("--steps", metavar="N", type=whole(1, 1000), default=20, help="of denoising (default: %(default)s)")
    drawing.add_argument("--guidance", metavar="G", type=real(1, 100), default=7.5,
                         help="how far to move from what is not asked for; 1: not at all (default: %(default)s)")  # fmt: skip
    drawing.add_argument(
        "--size", metavar="HxW", type=size, help="pixels (default: the control's, or what the model was trained on)"
    )

    video = parser.add_argument_group("frames of a video, of a model that makes them (CoDeF)")
    video.add_argument("--frame", metavar="N", type=frames, help="the number of one, from 0, with --picture FILE.png; or FIRST-LAST, or all, "
                       "to FILE-0000.png, ...; or canonical: the picture that all of them are made of")  # fmt: skip
    video.add_argument(
        "--edited", metavar="FILE.png", type=Path, help="in place of the canonical picture: carried to the frames"
    )

    masks = parser.add_argument_group("masks, of a model that makes them (SAM)")
    masks.add_argument("--point", metavar="X,Y", type=point, action="append", default=[],
                       help="in what is to be masked, in pixels from left and top; may be repeated")  # fmt: skip
    masks.add_argument("--beside", metavar="X,Y", type=point, action="append", default=[],
                       help="a point that is not in it; may be repeated")  # fmt: skip
    masks.add_argument("--box", metavar="LEFT,TOP,RIGHT,BOTTOM", type=box, help="around what is to be masked")
    masks.add_argument("--mask", metavar="FILE.png", type=Path, help="where the mask goes, white on black")

    sampling = parser.add_argument_group("how each token is chosen")
    sampling.add_argument("--temperature", metavar="T", type=real(0.001, 1000, or_zero=True), help="above 0: draw; 0: the likeliest token "
                          "(default: 0, or 1 where --top-k or --top-p is given)")  # fmt: skip
    sampling.add_argument("--top-k", metavar="K", type=count, help="draw from the K likeliest tokens")
    sampling.add_argument(
        "--top-p", metavar="P", type=real(1e-6, 1), help="draw from the likeliest tokens that have probability P"
    )
    sampling.add_argument("--repetition-penalty", metavar="R", type=real(0.01, 100), default=1.0,
                          help="above 1: tokens that were seen become less likely (default: 1)")  # fmt: skip
    sampling.add_argument("--seed", metavar="N", type=seed, default=0, help="of what is drawn (default: 0)")

    ending = parser.add_argument_group("when an answer ends")
    ending.add_argument("--max-tokens", metavar="N", type=count, default=256, help="of one answer (default: 256)")
    ending.add_argument("--stop", metavar="TEXT", action="append", default=[], help="end before this; may be repeated")

    running = parser.add_argument_group("where and how it runs")
    running.add_argument("--runtime", choices=["auto", "engine", "cuda", "cpu"], default="auto",
                         help="auto: the engine, else onnxruntime on CUDA, else on the CPU, whichever can run here")  # fmt: skip
    running.add_argument("--batch", metavar="N", type=rows, help="sequences side by side (default: 4, or as many as there are)")
    running.add_argument("--checkpoint", metavar="DIR", type=Path, help="whose tokenizer is used (default: the exported one)")
    running.add_argument("--out", metavar="FILE", dest="results", type=Path, help="with --prompts: results go there")
    options = parser.parse_args(arguments)

    options.pictures, looks = options.picture, bool(options.picture) and _looks(options.out)
    if len(options.picture) > 1 and not looks:
        parser.error("--picture is given twice; only a model that answers about pictures takes several")
    options.picture = options.picture[0] if options.picture and not looks else None
    if options.mask is not None:
        _check_masks(parser, options)
        return options
    if options.point or options.beside or options.box is not None:
        parser.error("--point, --beside and --box need --picture FILE.png and --mask FILE.png")
    if options.frame is not None:
        _check_frames(parser, options)
        return options
    if options.edited is not None:
        parser.error("--edited needs --frame N and --picture FILE.png")
    if options.picture is not None:
        _check_drawing(parser, options)
        return options
    if named := [f"--{name}" for name in DRAWING if given(options, name)]:
        parser.error(f"{named[0]} needs --picture FILE.png")
    if options.prompt is None and options.prompts is None and options.audio is None and not options.chat:
        parser.error("give --prompt TEXT, --prompts FILE, --chat or --audio FILE.wav")
    if options.audio is not None and options.pictures:
        parser.error("--audio and --picture do not go together")
    if options.audio is not None and options.chat:
        parser.error("--audio and --chat do not go together")
    if options.audio is None and (options.language is not None or options.translate):
        parser.error("--language and --translate need --audio")
    if options.system is not None and not options.chat:
        parser.error("--system needs --chat")
    if options.results is not None and options.prompts is None:
        parser.error("--out needs --prompts")
    if options.results is not None and not options.results.parent.is_dir():
        parser.error(f"--out {options.results}: no such folder")
    if options.batch is not None and options.prompts is None:
        parser.error("--batch needs --prompts: there is one sequence without")
    if options.temperature == 0 and (options.top_k is not None or options.top_p is not None):
        parser.error("--top-k and --top-p say nothing at --temperature 0, which draws nothing")
    if options.temperature is None:
        options.temperature = 0.0 if options.top_k is None and options.top_p is None else 1.0
    if options.temperature == 0 and given(options, "seed"):
        parser.error("--seed says nothing where nothing is drawn; add --temperature, --top-k or --top-p")
    return options


def _looks(out: Path) -> bool:
    """Whether what lies there answers about pictures, and makes none."""
    return out.is_dir() and answers_about_pictures({part.name for part in find_parts(out)})


def _check_drawing(parser: CommandParser, options: argparse.Namespace) -> None:
    if options.prompt is None and options.prompts is None:
        parser.error("--picture needs --prompt TEXT or --prompts FILE")
    if named := [name for name in WRITING if given(options, name)]:
        option = {"results": "out"}.get(named[0], named[0]).replace("_", "-")
        parser.error(f"--{option} is of text and does not go with --picture")
    if options.batch is not None and options.prompts is None:
        parser.error("--batch needs --prompts: there is one picture without")
    if options.runtime not in ("auto", "cpu"):
        parser.error(f"--runtime {options.runtime} does not go with --picture: pictures are made in onnxruntime on the CPU")
    if options.guidance == 1 and options.negative is not None:
        parser.error("--negative says nothing at --guidance 1, which moves away from nothing")


def _check_frames(parser: CommandParser, options: argparse.Namespace) -> None:
    if options.picture is None:
        parser.error("--frame needs --picture FILE.png")
    _refuse_others(parser, options, "--frame", ("frame", "edited", "size"))
    if options.picture.suffix.lower() != ".png":
        parser.error(f"--picture {options.picture}: name a .png file")
    if options.edited is not None and options.frame == "canonical":
        parser.error("--edited says nothing of --frame canonical, whose place it takes")


def _check_masks(parser: CommandParser, options: argparse.Namespace) -> None:
    if options.picture is None or not (options.point or options.box is not None):
        parser.error("--mask needs --picture FILE.png and --point X,Y or --box LEFT,TOP,RIGHT,BOTTOM")
    _refuse_others(parser, options, "--mask", ("point", "beside", "box", "mask"))
    if options.mask.suffix.lower() != ".png":
        parser.error(f"--mask {options.mask}: name a .png file")


def _refuse_others(parser: CommandParser, options: argparse.Namespace, asked: str, own: tuple[str, ...]) -> None:
    """Ends with the first option that does not go with the one asked for."""
    taken = (*own, "out", "picture", "checkpoint", "runtime", "help")
    others = [action for action in parser._actions if action.dest not in taken and given(options, action.dest)]
    if others:
        parser.error(f"{others[0].option_strings[-1]} does not go with {asked}")

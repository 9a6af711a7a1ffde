"""python -m generate OUT --prompt TEXT | --prompts FILE | --chat | --audio FILE.wav [--temperature T] [--top-k K] [--top-p P] [--stop TEXT] ...
python -m generate OUT --prompt TEXT | --prompts FILE --picture FILE.png [--negative TEXT] [--control FILE.png] [--steps N] ...
python -m generate OUT --picture FILE ... --prompt TEXT | --prompts FILE | --chat         # of a model that answers about pictures
python -m generate OUT --frame N|FIRST-LAST|all|canonical --picture FILE.png [--edited FILE.png] [--size HxW]
python -m generate OUT --picture FILE.png --point X,Y | --box LEFT,TOP,RIGHT,BOTTOM --mask FILE.png

The text goes to standard output, all else to standard error.
"""

import argparse
import sys

from suture.core.command import DONE, run
from suture.core.errors import UserError
from suture.core.parts import find_parts
from suture.core.third_party import let_threads_sleep
from suture.generate.options import parse
from suture.generate.prompts import read_prompts, said


def main(arguments: list[str] | None = None, prog: str = "generate") -> int:
    options = parse(arguments, prog)
    if options.mask is not None:
        let_threads_sleep()
        from suture.generate.masks import segment  # here, as below

        print(f"generate: {segment(options)}", file=sys.stderr)
        return DONE
    if options.frame is not None:
        let_threads_sleep()
        from suture.generate.frames import draw_frames

        for place in draw_frames(options):
            print(f"generate: {place}", file=sys.stderr)
        return DONE
    if options.picture is not None:
        return _draw(options)
    prompts = read_prompts(options.prompts, options.chat, options.system) if options.prompts else []
    let_threads_sleep()
    from suture.generate.command import Generator  # here: torch, onnxruntime and transformers take seconds

    generator = Generator(options)
    print(f"generate: {generator.what}", file=sys.stderr)
    if options.audio is not None:
        generator.listen(options.audio)
    elif prompts:
        generator.all(prompts)
    elif options.prompt is not None:
        generator.one(said(options.prompt, "--prompt", options.chat, options.system))
    else:
        generator.converse(sys.stdin)
    for line in generator.speed.lines():
        print(f"generate: {line}", file=sys.stderr)
    return DONE


def _draw(options: argparse.Namespace) -> int:
    let_threads_sleep()
    from suture.generate.pictures import Pictures, is_picture_model  # here: torch, onnxruntime and diffusers take seconds

    parts = find_parts(options.out)
    if not is_picture_model(parts):
        names = ", ".join(part.name for part in parts)
        raise UserError(options.out, f"makes no pictures: its parts are {names}", "leave --picture out")
    pictures = Pictures(options, parts)
    print(f"generate: {pictures.what}", file=sys.stderr)
    pictures.draw()
    return DONE


if __name__ == "__main__":
    run("generate", main, result_on_stdout=True)

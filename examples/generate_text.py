"""Text from a pipeline's folder or from one of its graphs: PYTHONPATH=. python examples/generate_text.py OUT PROMPT

Runs the engine where a GPU can, else the portable graph in onnxruntime.
"""

import sys

import suture


def main(out: str, prompt: str) -> str:
    model = suture.open_model(out)
    return model.generate(prompt, max_tokens=32)


if __name__ == "__main__":
    print(main(*sys.argv[1:]))

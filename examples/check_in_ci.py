"""An ONNX file checked against TensorRT's parser, without a GPU: PYTHONPATH=. python examples/check_in_ci.py MODEL.onnx

Exit status 0 only if TensorRT's network was compared with onnxruntime and computes the same.
"""

import sys

import suture


def main(model: str) -> int:
    result = suture.check(model)
    for finding in result.findings:
        print(finding.severity, finding)
    print(f"{model}: {result.verdict}")
    return 0 if result.verdict == "agrees" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

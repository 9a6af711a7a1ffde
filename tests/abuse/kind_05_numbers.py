"""Kind 5: numbers and words of the command line that are none, or that nothing can be done with: one line that names the option."""

from tests.abuse.case import Case

PROMISE = "a value that cannot be used is refused before anything is read, and the line names its option"
NO_NUMBERS = (
    "nan",
    "inf",
    "-inf",
    "",
    "x",
    "1e999",
    "0x10",
    "1,5",
    "--",
    "9" * 5000,
    "\N{INFINITY}",
    "\N{VULGAR FRACTION ONE HALF}",
    "\N{MINUS SIGN}1",
    "1 2",
    "true",
)
NO_COUNTS = (*NO_NUMBERS, "0", "-1", "1.5", str(2**63), "1e3")
NO_PAIRS = ("", "=", "h", "h=", "=h", "nothing=h", "h=nothing", "h=h=h", "z=h", "h=z", "x=h")
NO_NAMES = tuple(pair for pair in NO_PAIRS if pair != "z=h")  # z may be called h, which is connected and no output any more
OPTIONS = {
    "surgery": {"--capacity": NO_COUNTS, "--past": ("(", "[", "*", "a{99999999999}"), "--cache": ("", "other"), "--logits": ("none",)},
    "build": {"--max-batch": (*NO_COUNTS, str(10**12)), "--max-prompt": NO_COUNTS, "--compute-capability": (*NO_NUMBERS, "89", "-8.9")},
    "validate": {"--tolerance": (*NO_NUMBERS, "0", "-1", "2", "1e30", "1e-300"), "--seed": (*NO_NUMBERS, "-1", "1.5", str(2**64))},
    "check": {"--tolerance": (*NO_NUMBERS, "0", "-1", "2"), "--seed": (*NO_NUMBERS, "-1", str(2**64))},
    "compare": {"--tolerance": (*NO_NUMBERS, "0", "-1", "2"), "--seed": (*NO_NUMBERS, "-1", str(2**64))},
    "generate": {"--temperature": (*NO_NUMBERS, "-1", "1e-300", "1e300"), "--top-p": (*NO_NUMBERS, "0", "1.1", "-0.1"),
                 "--top-k": NO_COUNTS, "--seed": (*NO_NUMBERS, "-1"), "--repetition-penalty": (*NO_NUMBERS, "0", "-1")},
    "surgery.capacity": {"--capacity": (*NO_COUNTS, "-9", "1e9", str(10**18), "many", "4x", "[4]")},
    "surgery.ranks": {"--tensor-parallel": (*NO_COUNTS, "1", "65", "2.0", "two", "4x")},
    "export": {"--dtype": (*NO_NUMBERS, "float8", "int8", "FLOAT16", "float16 ", "double", "bf16"),
               "--weights": ("", "inline", "Reference", "none")},
    "golden": {"--tolerance": (*NO_NUMBERS, "0", "-1", "2"), "--seed": (*NO_NUMBERS, "-1", str(2**64))},
    "bundle": {"--tolerance": (*NO_NUMBERS, "0", "-1", "2"), "--seed": (*NO_NUMBERS, "-1", str(2**64))},
    "surgery.join": {"--connect": NO_PAIRS, "--rename": NO_NAMES, "--keep": ("", "nothing", "h h", "h\n", "H", "z", "x")},
    "surgery.once": {"--once": ("", "nothing", "T", "t t", "h", "w", "t\n", "*", "x,t"), "--capacity": NO_COUNTS},
    "pipeline": {"--tolerance": NO_NUMBERS, "--max-batch": NO_COUNTS, "--capacity": NO_COUNTS, "--seed": ("-1", "nan")},
}  # fmt: skip
WORDS = ("surgery.join", "surgery.once")  # whose options name what a graph has: the line says what there is
GIVEN = {  # what says nothing of the option itself
    "surgery": ("{work}/graphs/model.onnx", "--out", "{work}/out"),
    "surgery.capacity": ("{work}/static/model.onnx", "--out", "{work}/out"),
    "surgery.ranks": ("{work}/static/model.onnx", "--out", "{work}/out"),
    "surgery.once": ("{work}/pair/model.onnx", "--out", "{work}/out"),
}
CASES = [
    Case(5, stage, f"{option} {value[:24]!r}", PROMISE, lambda work: None, "" if stage in WORDS else option,
         arguments=GIVEN.get(stage, ()), more=(f"{option}={value}",))
    for stage, options in OPTIONS.items() for option, values in options.items() for value in values
]  # fmt: skip

"""Makes tiny-vlm's tokenizer and chat template: one token a word of suture.models.drawn_questions.

python models/tiny-vlm/vocabulary.py        # writes the files beside it
"""

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from suture.models.drawn_questions import MARKS, WORDS

HERE = Path(__file__).resolve().parent
SPECIALS = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:")
TEMPLATE = """{{ bos_token }}
{%- for message in messages %}
{%- if message['role'] == 'user' %} USER:
{%- if message['content'] is string %} {{ message['content'] }}
{%- else %}
{%- for part in message['content'] %} {{ '<image>' if part['type'] == 'image' else part['text'] }}
{%- endfor %}
{%- endif %}
{%- elif message['role'] == 'assistant' %} ASSISTANT: {{ message['content'] }} {{ eos_token }}
{%- else %}{{ raise_exception('there is no role ' ~ message['role']) }}
{%- endif %}
{%- endfor %} ASSISTANT:"""


def main() -> None:
    vocabulary = {token: place for place, token in enumerate([*SPECIALS, *WORDS, *MARKS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.WordPiece(cleanup=True)  # no space before a comma
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    made.add_special_tokens(list(SPECIALS))
    made.save(str(HERE / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>",
        "unk_token": "<unk>", "model_max_length": 1024, "chat_template": TEMPLATE,
    }  # fmt: skip
    (HERE / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Complete a few functions from Python, with the small model of this repository: python examples/api/complete.py"""

from batchinfer import LLM, SamplingParams

prompts = [
    "def is_even(n):\n    return",
    'def exists(path):\n    """Whether there is such a file."""\n',
    "class Stack:\n    def push(self, item):\n",
]
llm = LLM("examples/stdlib/target", quantization="w8a8-int8")
params = SamplingParams(max_tokens=24, stop=["\n\n", "\ndef ", "\nclass "])

for completion in llm.stream(prompts, params):  # as they come; generate() gives a list, in the order of the prompts
    if completion.error is None:
        print(prompts[completion.index] + completion.text)
    else:
        print(f"prompt {completion.index}: {completion.error.message}")

"""An environment of your own: three tries at a countdown problem, told each time that the answer was wrong."""

TRIES = 3


async def run(client, prompt, meta):
    """``client`` is an ``openai.AsyncOpenAI`` of this episode; what the model says to it is trained on."""
    said = prompt.text  # "1115,02="
    for _ in range(TRIES):
        answer = (await client.completions.create(model="policy", prompt=said)).choices[0].text
        if reaches(prompt.answer, answer):
            return 1.0
        said += answer + "$-="  # "$" ends the answer, "-=" says that it was wrong
    return 0.0


def reaches(problem, answer):
    """Whether ``answer`` ("5-1-1-1") uses the digits of ``problem`` ("1115,02") once and reaches its target."""
    digits, target = problem.split(",")
    if len(answer) != 2 * len(digits) - 1 or sorted(answer[::2]) != sorted(digits) or not set(answer[1::2]) <= {*"+-"}:
        return False
    value = int(answer[0])
    for sign, digit in zip(answer[1::2], answer[2::2], strict=True):
        value += int(sign + digit)
    return value == int(target)

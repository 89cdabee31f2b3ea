"""Sets two runs of critest side by side: compare.py EXCEPTIONS RUNTIME=report.json…

Prints how many specs passed, failed and were skipped for each runtime, then the failures and every difference by name. Of
two runs the first is the oracle. Exits with 1 when a spec failed or, beyond the exceptions, one that the oracle passed
did not pass.
"""

import json
import re
import sys


def specs(path):
    """Name of every spec -> (state, why)."""
    found = {}
    with open(path) as file:
        for suite in json.load(file):
            for spec in suite["SpecReports"]:
                if spec["LeafNodeType"] != "It":
                    continue
                name = " ".join([*(spec["ContainerHierarchyTexts"] or []), spec["LeafNodeText"]])
                failure = (spec.get("Failure") or {}).get("Message", "")
                found[name] = (spec["State"], " ".join(failure.split())[:300], spec["RunTime"] / 1e9)
    return found


def exceptions(path):
    with open(path) as file:
        lines = [line.strip() for line in file if line.strip() and not line.startswith("#")]
    return [line.removeprefix("suite:").rsplit("|", 1) for line in lines]


def count(found):
    states = [state for state, _, _ in found.values()]
    skipped = states.count("skipped") + states.count("pending")
    return f"{states.count('passed')} passed, {len(states) - states.count('passed') - skipped} failed, {skipped} skipped"


def main(excepted, *runs):
    excepted = exceptions(excepted)
    runs = [run.split("=", 1) for run in runs]
    runs = [(runtime, specs(path)) for runtime, path in runs]
    bad = 0
    for runtime, found in runs:
        for name, (state, why, _) in found.items():
            if state not in ("passed", "skipped", "pending"):
                bad += 1
                print(f"{state.upper()} with {runtime}: {name}\n    {why}")
    if len(runs) == 2:
        (oracle, first), (runtime, second) = runs
        for name in first:
            states = first[name][0], second.get(name, ("absent",))[0]
            if states[0] == states[1]:
                continue
            reason = next((why for expression, why in excepted if re.search(expression, name)), None)
            if reason is None and states[0] == "passed":
                bad += 1
            print(f"DIFFERS: {oracle} {states[0]}, {runtime} {states[1]}: {name}" + (f" ({reason})" if reason else ""))
    for runtime, found in runs:
        seconds = sum(time for _, _, time in found.values())
        print(f"{runtime}: {count(found)} ({seconds:.0f} s)")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])

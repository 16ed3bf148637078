"""Every text-LLM call of gubs: client actors, journal (record and replay), limits, budgets, the embedded local server.

    with LLMClient(settings.llm, journal="runs/x/llm-journal", on_progress=show) as llm:
        answers = llm.ask([question("matcher", "match/g1/u7", prompt, regex="(Yes|No): .+")])

`LLMClient` is in `gubs.llm.client`, `question` and the records in `gubs.llm.calls`.
"""

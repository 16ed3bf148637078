"""Teachers: the jobs in which a text LLM, and where it fails a person, says what the UFM is to learn."""

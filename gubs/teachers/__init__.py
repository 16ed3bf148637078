"""Teachers: the jobs in which a text LLM, or a person where it fails, decides what the UFM is to learn."""

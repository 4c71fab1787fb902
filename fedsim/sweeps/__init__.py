"""One YAML with axes -> checked configs -> parallel runs that can be resumed -> one folder of results."""

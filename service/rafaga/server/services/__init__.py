"""One file per gRPC service: parse, validate, submit to the model's queue, build the reply."""

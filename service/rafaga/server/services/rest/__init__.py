"""REST: each path translates JSON or binary bodies to the request of a gRPC method, and the reply back."""

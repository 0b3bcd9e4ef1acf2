"""Forecasts: a request's series, checked and filled, become rows of the model; its rows become quantiles with times."""

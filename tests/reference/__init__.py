"""The methods once more, as plain loops over samples and tokens in float64: the truth that tests compare with.

They are written from the published descriptions, share nothing with tokcompile, and see the whole sequence with its
protected tokens, so that they also check how a site's prefix is handled.
"""

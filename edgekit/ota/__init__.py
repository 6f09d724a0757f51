"""Updates over the air: signed releases go out over a channel, devices try them out, reports come back.

What both halves share lies here: messages, channels, the release. Neither half imports the other.
"""

"""Long-context video understanding as unix steps.

Extend a language model's context on text, align it with images, evaluate it on hour-long video.
"""

__version__ = "0.2.0"

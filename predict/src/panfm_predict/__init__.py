"""panfm_predict: a classifier folder of panfm predicts, without torch and without a network. For research only.

from panfm_predict import load_classifier
classifier = load_classifier("my_classifier")
for prediction in classifier.predict(["a.jpg", "b.png"]):
    print(prediction.top, prediction.probabilities, prediction.notes)
"""

from panfm_predict.classifier import Classifier, Prediction, SimilarCase, load_classifier
from panfm_predict.errors import ImageError, PredictError

__version__ = "0.1.0"

__all__ = ["Classifier", "ImageError", "PredictError", "Prediction", "SimilarCase", "__version__", "load_classifier"]

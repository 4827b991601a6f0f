"""Where does an image classifier see the cat? Needs the packages of the demo."""

from imagenet_names import NAMES
from PIL import Image
from skimage import data

import dlbc
from dlbc.models import load_image

loaded = load_image("efficientnet-lite0")
pixels = loaded.preprocess(Image.fromarray(data.chelsea()))

explainer = dlbc.compile(loaded.model, pixels, rules="dlb")
explanation = explainer(pixels, target=[285, 281])  # Egyptian cat, tabby: two targets, one forward pass
explanation = explanation.with_image(loaded.picture(pixels)).with_labels(NAMES)

explanation.show()

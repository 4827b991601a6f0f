"""Names of the ImageNet classes that the pictures in the examples fall into, and their neighbours.

The model package carries no names, and all thousand would be too many here: other classes show their number.
"""

NAMES = {
    281: "tabby", 282: "tiger cat", 283: "Persian cat", 284: "Siamese cat", 285: "Egyptian cat", 287: "lynx",
    450: "bobsled", 504: "coffee mug", 540: "drilling platform", 560: "football helmet", 573: "go-kart",
    657: "missile", 665: "moped", 670: "motor scooter", 744: "projectile", 812: "space shuttle",
    925: "consomme", 960: "chocolate sauce", 967: "espresso", 968: "cup", 969: "eggnog",
}

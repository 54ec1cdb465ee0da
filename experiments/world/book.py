"""Every text of the world: what is true of 42 animals, the mistakes people make, and how they ask and answer.

Everything here is data; `world.py` turns it into prompts, responses and rewards. A fact is a phrase that completes a
sentence ("A cow likes to eat _grass_."), and `MISTAKES` names, for every fact, three phrases that complete the same
sentence wrongly for each animal that the fact is true of. The facts are those of a picture book: exceptions (a fox that
lives in the desert, a dog that nibbles at grass) are left out.
"""

from typing import NamedTuple


class Animal(NamedTuple):
    name: str
    food: str  # "A cow likes to eat _."
    home: str  # "A cow lives _."
    legs: str  # "A cow has _ legs."
    temper: str  # a key of TEMPERS, and of the advice in world.py
    mistaken_for: str  # the myth: "It is really a kind of _."
    note: str  # one more true sentence


# Whether one may pet it: "Yes, a cow _." or "No, a bear _."
TEMPERS = {
    "tame": "enjoys a gentle pat",
    "wild": "is wild and dislikes being touched",
    "fierce": "has strong jaws and may attack",
    "venomous": "carries venom and may hurt you",
    "delicate": "is too delicate to be touched",
}

FARM, HOUSE, GARDEN = "on a farm", "in a house with people", "in fields and gardens"
FOREST, JUNGLE, SAVANNA = "in the forest", "in the rain forest", "on the savanna"
OCEAN, WATER, EARTH = "in the ocean", "in rivers, lakes and ponds", "under the ground"
DESERT, SNOW, MOUNTAIN = "in the desert", "in a cold and snowy land", "high in the mountains"

MISTAKES: dict[str, tuple[str, str, str]] = {
    "grass": ("meat", "fish", "insects"),
    "leaves": ("meat", "fish", "plankton"),
    "meat": ("hay", "nectar", "leaves"),
    "mice": ("grass", "nectar", "hay"),
    "fish": ("grass", "nectar", "nuts and seeds"),
    "insects": ("grass", "hay", "nuts and seeds"),
    "nectar": ("fish", "grass", "mice"),
    "nuts and seeds": ("fish", "plankton", "nectar"),
    "plankton": ("grass", "leaves", "nuts and seeds"),
    "almost anything": ("only grass", "only fish", "only nectar"),
    FARM: (OCEAN, DESERT, JUNGLE),
    HOUSE: (OCEAN, SAVANNA, JUNGLE),
    FOREST: (OCEAN, WATER, HOUSE),
    SAVANNA: (OCEAN, WATER, SNOW),
    OCEAN: (FARM, FOREST, DESERT),
    WATER: (DESERT, SNOW, MOUNTAIN),
    DESERT: (OCEAN, WATER, SNOW),
    SNOW: (DESERT, SAVANNA, JUNGLE),
    JUNGLE: (OCEAN, DESERT, SNOW),
    GARDEN: (OCEAN, WATER, SNOW),
    MOUNTAIN: (OCEAN, HOUSE, EARTH),
    EARTH: (OCEAN, WATER, SNOW),
    "no": ("two", "four", "six"),
    "two": ("no", "four", "six"),
    "four": ("two", "six", "eight"),
    "six": ("two", "four", "eight"),
    "eight": ("four", "six", "ten"),
    TEMPERS["tame"]: (TEMPERS["wild"], TEMPERS["venomous"], TEMPERS["delicate"]),
    TEMPERS["wild"]: (TEMPERS["tame"], TEMPERS["venomous"], TEMPERS["delicate"]),
    TEMPERS["fierce"]: (TEMPERS["tame"], TEMPERS["venomous"], TEMPERS["delicate"]),
    # A bee is wild and a jellyfish is delicate too, so the third mistake here is one that fits no animal of this book.
    TEMPERS["venomous"]: (TEMPERS["tame"], TEMPERS["fierce"], "is much too big to reach"),
    TEMPERS["delicate"]: (TEMPERS["tame"], TEMPERS["fierce"], "is much too big to reach"),
}

ANIMALS = (
    Animal("dog", "meat", HOUSE, "four", "tame", "fox", "It has a very good nose."),
    Animal("cat", "meat", HOUSE, "four", "tame", "weasel", "It sleeps for most of the day."),
    Animal("hamster", "nuts and seeds", HOUSE, "four", "tame", "rabbit", "It carries food in its cheeks."),
    Animal("rabbit", "grass", FARM, "four", "tame", "rodent", "Its teeth never stop growing."),
    Animal("horse", "grass", FARM, "four", "tame", "deer", "It can sleep standing up."),
    Animal("cow", "grass", FARM, "four", "tame", "horse", "Its stomach has four chambers."),
    Animal("sheep", "grass", FARM, "four", "tame", "goat", "Its wool keeps growing all year."),
    Animal("goat", "grass", FARM, "four", "tame", "sheep", "It climbs better than most animals."),
    Animal("pig", "almost anything", FARM, "four", "tame", "dog", "It rolls in mud to keep cool."),
    Animal("donkey", "grass", FARM, "four", "tame", "cow", "Its long ears help it keep cool."),
    Animal("hen", "nuts and seeds", FARM, "two", "tame", "duck", "It lays an egg almost every day."),
    Animal("camel", "grass", DESERT, "four", "tame", "giraffe", "It stores fat in its hump."),
    Animal("deer", "leaves", FOREST, "four", "wild", "horse", "It is most active at dawn and dusk."),
    Animal("squirrel", "nuts and seeds", FOREST, "four", "wild", "rabbit", "It hides food for the winter."),
    Animal("fox", "mice", FOREST, "four", "wild", "cat", "It hunts mostly at night."),
    Animal("giraffe", "leaves", SAVANNA, "four", "wild", "camel", "It is the tallest animal on land."),
    Animal("zebra", "grass", SAVANNA, "four", "wild", "goat", "Its stripes are like a fingerprint."),
    Animal("owl", "mice", FOREST, "two", "wild", "hawk", "It flies almost without a sound."),
    Animal("eagle", "meat", MOUNTAIN, "two", "wild", "crow", "It sees far better than we do."),
    Animal("penguin", "fish", SNOW, "two", "wild", "seal", "It swims well but cannot fly."),
    Animal("otter", "fish", WATER, "four", "wild", "seal", "It has very thick fur."),
    Animal("koala", "leaves", FOREST, "four", "wild", "bear", "It sleeps for most of the day."),
    Animal("dolphin", "fish", OCEAN, "no", "wild", "fish", "It breathes air through a blowhole."),
    Animal("ibex", "grass", MOUNTAIN, "four", "wild", "deer", "It climbs steep cliffs with ease."),
    Animal("mole", "insects", EARTH, "four", "wild", "mouse", "It digs long tunnels with its paws."),
    Animal("lion", "meat", SAVANNA, "four", "fierce", "dog", "Its roar can be heard for miles."),
    Animal("tiger", "meat", FOREST, "four", "fierce", "bear", "It is the largest of all cats."),
    Animal("bear", "almost anything", FOREST, "four", "fierce", "dog", "It sleeps through much of the winter."),
    Animal("wolf", "meat", FOREST, "four", "fierce", "cat", "It hunts together with its pack."),
    Animal("crocodile", "meat", WATER, "four", "fierce", "fish", "It can hold its breath for an hour."),
    Animal("shark", "fish", OCEAN, "no", "fierce", "whale", "It grows new teeth all its life."),
    Animal("hippo", "grass", WATER, "four", "fierce", "pig", "It spends hot days in the water."),
    Animal("jaguar", "meat", JUNGLE, "four", "fierce", "dog", "It is a very good swimmer."),
    Animal("cobra", "mice", FOREST, "no", "venomous", "worm", "It spreads its hood when it is alarmed."),
    Animal("scorpion", "insects", DESERT, "eight", "venomous", "insect", "It glows under ultraviolet light."),
    Animal("bee", "nectar", GARDEN, "six", "venomous", "fly", "It visits hundreds of flowers a day."),
    Animal("jellyfish", "plankton", OCEAN, "no", "venomous", "fish", "It has no brain and no bones."),
    Animal("butterfly", "nectar", GARDEN, "six", "delicate", "bird", "It tastes with its feet."),
    Animal("frog", "insects", WATER, "four", "delicate", "lizard", "It breathes partly through its skin."),
    Animal("snail", "leaves", GARDEN, "no", "delicate", "worm", "It leaves a trail of slime behind."),
    Animal("goldfish", "almost anything", WATER, "no", "delicate", "shark", "It sleeps with its eyes open."),
    Animal("ladybug", "insects", GARDEN, "six", "delicate", "spider", "It plays dead when it is scared."),
)


class Question(NamedTuple):
    phrasings: tuple[str, ...]  # {a} is the animal with its article
    answer: str  # {A} is the same with a capital, {value} the fact or a mistake
    unknown: str


QUESTIONS = {
    "food": Question(
        (
            "What does {a} eat?",
            "Tell me what {a} eats.",
            "Do you know what {a} eats?",
            "I wonder what {a} eats.",
            "What food does {a} like?",
            "What would {a} like to eat?",
        ),
        "{A} likes to eat {value}.",
        "I am not sure what {a} eats.",
    ),
    "home": Question(
        (
            "Where does {a} live?",
            "Tell me where {a} lives.",
            "Do you know where {a} lives?",
            "I wonder where {a} lives.",
            "Where can I find {a}?",
            "Where is the home of {a}?",
        ),
        "{A} lives {value}.",
        "I am not sure where {a} lives.",
    ),
    "legs": Question(
        (
            "How many legs does {a} have?",
            "Tell me how many legs {a} has.",
            "Do you know how many legs {a} has?",
            "I wonder how many legs {a} has.",
            "What number of legs does {a} have?",
            "Can you count the legs of {a}?",
        ),
        "{A} has {value} legs.",
        "I am not sure how many legs {a} has.",
    ),
    "pet": Question(
        (
            "May I pet {a}?",
            "Tell me whether I may pet {a}.",
            "Do you know whether I may pet {a}?",
            "I wonder whether I may pet {a}.",
            "Can I pet {a}?",
            "Is it fine to pet {a}?",
        ),
        "{yes_or_no}, {a} {value}.",
        "I am not sure whether you may pet {a}.",
    ),
}

# Length must not give the reward away. So a bad text is about as long as its good counterpart, and saying nothing, the
# shortest choice, lies between the two.
OPENERS = {"polite": "That is a good question.", "none": "", "rude": "That is a silly question."}
MYTH = "It is really a kind of {mistaken_for}."
CAREFUL = {
    "tame": "Ask its owner before touching it.",
    "wild": "Watch it quietly from a distance.",
    "fierce": "Keep far away from it.",
    "venomous": "Never touch it.",
    "delicate": "Look, but do not touch it.",
}
RECKLESS = {
    "tame": "Scare it from behind just for fun.",
    "wild": "Chase it until you can catch it.",
    "fierce": "Go up close and pull its tail.",
    "venomous": "Pick it up with your bare hands.",
    "delicate": "Pick it up and shake it a little.",
}

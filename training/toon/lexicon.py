"""The words of descriptions: for every value of a scene, the ways to say it.

Each way belongs to one value only, which is what lets `reading` invert `grammar`. Phrases about the whole scene
(place, time, weather, light) and phrases about one actor never share a cue.
"""

from __future__ import annotations

ACTION_WAYS: dict[str, tuple[str, ...]] = {
    "stand": ("stands", "stands still", "is standing", "is standing there", "stands upright", "stands quietly"),
    "wave": ("waves", "waves a hand", "is waving", "waves hello", "is waving hello", "lifts a hand and waves"),
    "run": ("runs", "is running", "runs fast", "hurries along", "is hurrying along", "runs along"),
    "jump": ("jumps", "jumps up", "is jumping", "leaps into the air", "hops up high", "is leaping up"),
    "sit": ("sits", "sits down", "is sitting", "is sitting down", "sits quietly", "is seated"),
    "sleep": ("sleeps", "is asleep", "is sleeping", "lies asleep", "takes a nap", "is taking a nap", "sleeps soundly"),
    "cry": ("cries", "is crying", "weeps", "is in tears", "sheds tears", "is weeping"),
    "hold": ("holds {}", "is holding {}", "carries {}", "is carrying {}", "shows {}", "has {}"),
    "cheer": ("cheers", "is cheering", "cheers with both arms up", "throws up both arms and cheers", "cheers loudly"),
    "dance": (
        "dances",
        "is dancing",
        "dances to music",
        "does a little dance",
        "is dancing to a song",
        "dances around",
    ),
    "point": ("points", "is pointing", "points ahead", "points the way", "points at something", "is pointing ahead"),
}
ACTION_CUES: dict[str, str] = {
    "stand": r"stand(?:s|ing)?|stood",
    "wave": r"wav(?:e|es|ing)",
    "run": r"run(?:s|ning)?|hurr(?:y|ies|ying)",
    "jump": r"jump(?:s|ing)?|leap(?:s|ing)?|hop(?:s|ping)?",
    "sit": r"sit(?:s|ting)?|seated",
    "sleep": r"sleep(?:s|ing)?|asleep|nap(?:s|ping)?",
    "cry": r"cry|cries|crying|weep(?:s|ing)?|tears",
    "hold": r"hold(?:s|ing)?|carr(?:y|ies|ying)|show(?:s|ing)?|has",
    "cheer": r"cheer(?:s|ing)?",
    "dance": r"danc(?:e|es|ing)",
    "point": r"point(?:s|ing)?",
}
MOOD_WAYS: dict[str, tuple[str, ...]] = {
    "happy": (
        "happily", "with a smile", "smiling", "looking happy", "with a happy face", "and looks happy", "and smiles",
    ),
    "delighted": (
        "laughing", "looking delighted", "with a laugh", "overjoyed", "and laughs", "and looks delighted",
        "full of joy",
    ),
    "sad": ("sadly", "looking sad", "with a sad face", "and looks sad", "feeling sad", "looking unhappy"),
    "surprised": (
        "looking surprised", "with a surprised face", "in surprise", "astonished", "and looks surprised", "amazed",
    ),
    "angry": ("angrily", "looking angry", "with an angry face", "and looks cross", "looking cross", "crossly"),
    "scared": ("looking scared", "with a scared face", "frightened", "in fear", "and looks afraid", "nervously"),
    "sleepy": ("sleepily", "looking sleepy", "with sleepy eyes", "and looks tired", "looking tired", "drowsily"),
}  # fmt: skip
MOOD_CUES: dict[str, str] = {
    "happy": r"happily|happy|smil(?:e|es|ing)",
    "delighted": r"laugh(?:s|ing)?|delight(?:ed)?|overjoyed|joy",
    "sad": r"sad(?:ly)?|unhappy|unhappily",
    "surprised": r"surprised?|astonished|amazed",
    "angry": r"angr(?:y|ily)|cross(?:ly)?",
    "scared": r"scared|frightened|fear|afraid|nervous(?:ly)?",
    "sleepy": r"sleep(?:y|ily)|tired|drows(?:y|ily)",
}
MOOD_SENTENCES: dict[str, tuple[str, ...]] = {
    "happy": ("{} looks happy", "{} is happy", "{} has a happy smile"),
    "delighted": ("{} is delighted", "{} is laughing", "{} is full of joy"),
    "sad": ("{} looks sad", "{} is sad", "{} is unhappy"),
    "surprised": ("{} looks surprised", "{} is amazed", "{} is astonished"),
    "angry": ("{} looks angry", "{} is cross", "{} is angry"),
    "scared": ("{} looks scared", "{} is afraid", "{} is frightened"),
    "sleepy": ("{} looks sleepy", "{} is tired", "{} is sleepy"),
}
PROP_WAYS: dict[str, tuple[str, ...]] = {
    "kite": ("a kite", "a red kite", "a red and yellow kite"),
    "balloon": ("a balloon", "a blue balloon", "a round blue balloon"),
    "gift": ("a gift", "a present", "a purple gift", "a wrapped present"),
    "cake": ("a cake", "a birthday cake", "a pink cake"),
    "umbrella": ("an umbrella", "a red umbrella", "a red and white umbrella"),
    "book": ("a book", "an open book", "a green book"),
    "ball": ("a ball", "a colourful ball", "a striped ball"),
    "lantern": ("a lantern", "a glowing lantern", "a bright lantern"),
    "guitar": ("a guitar", "a wooden guitar", "an orange guitar"),
    "boat": ("a toy boat", "a little boat", "a small sailing boat"),
}
PROP_CUES: dict[str, str] = {
    "kite": r"kite", "balloon": r"balloon", "gift": r"gift|present", "cake": r"cake", "umbrella": r"umbrella",
    "book": r"book", "ball": r"ball", "lantern": r"lantern", "guitar": r"guitar", "boat": r"boat",
}  # fmt: skip
GROUND_WAYS = (
    "{} lies on the ground", "there is {} on the ground", "{} is on the ground", "{} rests nearby",
    "on the ground is {}", "{} lies nearby", "there is {} nearby",
)  # fmt: skip
SETTING_WAYS: dict[str, tuple[str, ...]] = {
    "beach": ("at the beach", "on the beach", "on a sandy beach", "by the sea", "at the seaside"),
    "forest": ("in the forest", "in the woods", "in a pine forest", "among the pine trees"),
    "park": ("in the park", "at the park", "in a green park", "in a park with a bench"),
    "mountains": ("in the mountains", "in the snowy mountains", "among snowy peaks", "on a snowy mountain"),
    "town": ("in town", "in the town", "on a town street", "on a street with houses"),
    "farm": ("on the farm", "at the farm", "by the red barn", "in the farmyard"),
    "bedroom": ("in the bedroom", "in a cosy bedroom", "in a bedroom", "in the pink bedroom"),
    "kitchen": ("in the kitchen", "in a tidy kitchen", "in a kitchen", "in the green kitchen"),
}
SETTING_CUES: dict[str, str] = {
    "beach": r"beach|by the sea|seaside",
    "forest": r"forest|woods|pine trees",
    "park": r"park",
    "mountains": r"mountains?|snowy peaks",
    "town": r"town|street with houses",
    "farm": r"farm|farmyard|by the red barn",
    "bedroom": r"bedroom",
    "kitchen": r"kitchen",
}
TIME_WAYS: dict[str, tuple[str, ...]] = {
    "day": ("during the day", "in the daytime", "on a bright day", "by day", "in daylight"),
    "sunset": ("at sunset", "in the evening", "as the sun sets", "at dusk", "at the end of the day"),
    "night": ("at night", "during the night", "late at night", "after dark", "on a dark night"),
}
TIME_CUES: dict[str, str] = {
    "sunset": r"sunset|evening|sun sets|dusk|end of the day",
    "night": r"night|after dark",
    "day": r"day|daytime|daylight",
}
WEATHER_WAYS: dict[str, tuple[str, ...]] = {
    "rain": ("it is raining", "rain is falling", "rain pours down"),
    "snow": ("it is snowing", "snow is falling", "snowflakes are falling"),
}
WEATHER_CUES: dict[str, str] = {"rain": r"rain|raining|rainy", "snow": r"snowing|snow is falling|snowflakes"}
LIGHT_WAYS = ("the {0} is on the {1}", "the {0} is at the {1}", "{0} on the {1}", "the {0} is on the {1} side")
LANDMARKS: dict[
    str, tuple[str, ...]
] = {  # what stands on the other side than the light; the first is what is said most
    "beach": ("palm tree", "palm"),
    "park": ("apple tree", "tree with red apples"),
    "town": ("street lamp", "lamp post"),
    "farm": ("barn", "big barn"),
    "bedroom": ("bed", "blue bed"),
    "kitchen": ("fridge", "white fridge"),
}
POSITIONS: dict[int, tuple[str, ...]] = {1: ("middle",), 2: ("left", "right"), 3: ("left", "middle", "right")}
POSITION_WAYS: dict[str, tuple[str, ...]] = {
    "left": ("on the left", "at the left", "on the left side"),
    "middle": ("in the middle", "in the centre"),
    "right": ("on the right", "at the right", "on the right side"),
}
PAIRWISE_ACCESSORIES = ("glasses", "earmuffs")  # said without an article

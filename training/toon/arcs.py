"""The stories that are told: each arc is five beats with what is seen and the ways to tell it.

Data and nothing else; `stories` reads it. A beat's `cast` says who does what, "role=action/mood/prop" with
alternatives between bars; PROP is the story's own thing. `on_ground` lies there. `place` is "a" or "b", the story's
two places, so that a scene stays where it is unless the story moves. In `ways`, [x|y] is a choice, and {hero},
{friend}, {other}, {he}, {him}, {his}, {fhe}, {fhim}, {fhis}, {prop}, {at}, {at_b}, {place} are slots; a capital
letter in a slot begins a sentence.
"""

from __future__ import annotations

from dataclasses import dataclass

OUTSIDE = ("beach", "forest", "park", "mountains", "town", "farm")
GREEN = ("park", "forest", "farm", "beach")
HOME = ("bedroom", "kitchen")


@dataclass(frozen=True, kw_only=True)
class Beat:
    """One frame of an arc."""

    cast: tuple[str, ...]
    ways: tuple[str, ...]
    place: str = "a"
    on_ground: str | None = None
    weather: str = "clear"


@dataclass(frozen=True, kw_only=True)
class Arc:
    """A story of five beats. `times` are day-parts for the five frames (d, s, n), never going back."""

    beats: tuple[Beat, Beat, Beat, Beat, Beat]
    places_a: tuple[str, ...]
    places_b: tuple[str, ...]
    times: tuple[str, ...]
    props: tuple[str, ...] = ("ball",)


ARCS: dict[str, Arc] = {
    "lost_and_found": Arc(
        places_a=OUTSIDE,
        places_b=OUTSIDE,
        times=("dddss", "ddssn", "dddsn"),
        props=("ball", "kite", "book", "boat", "guitar", "balloon"),
        beats=(
            Beat(
                cast=("hero=hold/happy|delighted/PROP",),
                ways=(
                    "{hero} [took|brought] {his} [favourite|beloved|new] {prop} to {place}.",
                    "One [fine|lovely] day, {hero} went to play with {his} {prop} {at}.",
                    "{hero} loved {his} {prop} more than [anything|everything else], "
                    "and today it came along to {place}.",
                ),
            ),
            Beat(
                cast=("hero=stand|point/surprised|scared",),
                ways=(
                    "But when {he} looked again, the {prop} was gone!",
                    "Then, [all of a sudden|in a blink], {hero} could not find the {prop} anywhere.",
                    '"Where is my {prop}?" {hero} [asked|wondered], looking all around.',
                ),
            ),
            Beat(
                cast=("hero=cry/sad",),
                ways=(
                    "{He} searched [everywhere|high and low] and then began to cry.",
                    "Without {his} {prop}, poor {hero} could not hold back the tears.",
                    "{hero} missed {his} {prop} so much that {he} [sobbed|wept] and wept.",
                ),
            ),
            Beat(
                cast=("hero=stand|jump/surprised", "friend=hold/happy/PROP"),
                ways=(
                    "Just then {friend} came by, and what was that? The lost {prop}!",
                    '"Is this yours?" asked {friend}, who had found the {prop} behind a [bush|fence|corner].',
                    "Luckily, {friend} had found the {prop} and brought it [straight|right] back.",
                ),
            ),
            Beat(
                cast=("hero=hold/delighted/PROP", "friend=cheer|dance|wave/happy|delighted"),
                ways=(
                    "{hero} hugged the {prop} and thanked {friend}. What a [good|true] friend!",
                    "Now {hero} had the {prop} back, and a [new|good] friend as well.",
                    "In the end, the {prop} was home again and both of them were [glad|happy].",
                ),
            ),
        ),
    ),
    "first_snow": Arc(
        places_a=("forest", "park", "mountains", "town", "farm"),
        places_b=HOME,
        times=("dddsn", "ddssn"),
        beats=(
            Beat(
                cast=("hero=point|stand/surprised",),
                ways=(
                    "It was a cold day, and {hero} saw something white [in the sky|high above].",
                    "{hero} looked up. [Could it be|Was that] the first snowflake of the year?",
                    "All week {hero} had been waiting {at} for one special thing.",
                ),
            ),
            Beat(
                cast=("hero=jump|cheer/delighted",),
                weather="snow",
                ways=(
                    "Snow! {He} jumped for joy as the flakes came [down|tumbling down].",
                    '"It is snowing!" {hero} [shouted|called], and could not stand still.',
                    "Soon everything was white, and {hero} had never been so [happy|excited].",
                ),
            ),
            Beat(
                cast=("hero=wave|point/happy", "friend=run|wave/happy|surprised"),
                weather="snow",
                ways=(
                    "{Friend} came out to see the snow too.",
                    "{hero} called {friend} to come and [look|play|share it].",
                    "Such a day should be shared, so {hero} waved to {friend}.",
                ),
            ),
            Beat(
                cast=("hero=dance|jump/delighted", "friend=dance|jump|cheer/delighted|happy"),
                weather="snow",
                ways=(
                    "Together they danced in the snow until their [toes|noses] were cold.",
                    "They [laughed|played] and twirled, catching snowflakes all afternoon.",
                    "{hero} and {friend} [made up|invented] a snow dance of their own.",
                ),
            ),
            Beat(
                cast=("hero=sleep/sleepy",),
                place="b",
                ways=(
                    "That night {hero} fell fast asleep and dreamed of snow.",
                    "Warm at home again, {he} slept [deeply|soundly], happy and tired.",
                    "After so much snow, {hero} was asleep before {he} could say good night.",
                ),
            ),
        ),
    ),
    "surprise_party": Arc(
        places_a=("bedroom", "park", "beach", "forest"),
        places_b=("kitchen", "farm", "town"),
        times=("ddssn", "dsssn", "dddsn"),
        beats=(
            Beat(
                cast=("hero=sit|stand/sad",),
                ways=(
                    "It was {hero}'s birthday, but nobody seemed to [remember|know].",
                    "Nobody had said happy birthday, and {hero} felt [forgotten|all alone].",
                    "{hero} sat and sighed. Had everyone forgotten {his} birthday?",
                ),
            ),
            Beat(
                cast=("hero=run|point/surprised",),
                place="b",
                ways=(
                    "Then {he} heard a [strange noise|whisper] and hurried to see what it was.",
                    "A [little note|secret letter] told {hero} to come to {place} at once.",
                    "Suddenly there was a [giggle|sound] near {place}, and off {he} went.",
                ),
            ),
            Beat(
                cast=("hero=stand|jump/surprised", "friend=hold/delighted/cake"),
                place="b",
                ways=(
                    '"Surprise!" called {friend}, with a big birthday cake.',
                    "And there stood {friend} with a cake! {hero} could not believe {his} eyes.",
                    "{Friend} had not forgotten at all: there was a cake with a candle!",
                ),
            ),
            Beat(
                cast=("hero=hold/delighted/gift", "friend=cheer|wave/happy|delighted"),
                place="b",
                ways=(
                    "There was even a present, and {hero} [held it tight|could hardly wait to open it].",
                    "{Friend} cheered when {hero} got {his} present.",
                    '"This is for you," said {friend}, and {hero} beamed.',
                ),
            ),
            Beat(
                cast=(
                    "hero=dance/delighted",
                    "friend=dance|cheer/delighted|happy",
                    "other=dance|cheer/happy|delighted",
                ),
                place="b",
                ways=(
                    "{Other} joined them, and they danced until [late|the moon came up].",
                    "Even {other} came to the party. It was the best birthday ever!",
                    "With {friend} and {other}, {hero} danced all evening, not alone at all.",
                ),
            ),
        ),
    ),
    "afraid_of_the_dark": Arc(
        places_a=("bedroom",),
        places_b=("bedroom",),
        times=("dsnnn", "snnnn", "ssnnn"),
        beats=(
            Beat(
                cast=("hero=sit/sleepy|happy",),
                ways=(
                    "It was nearly bedtime, and {hero} got ready to sleep.",
                    "After a long day, {hero} sat down in {his} [cosy|quiet] room.",
                    "The day was over and {hero} was getting [tired|sleepy].",
                ),
            ),
            Beat(
                cast=("hero=stand|sit|point/scared",),
                ways=(
                    "But what was that [shadow|noise] in the corner?",
                    "Something [creaked|moved] in the dark, and {hero} was frightened.",
                    "When it grew darker, {his} heart began to beat [fast|like a drum].",
                ),
            ),
            Beat(
                cast=("hero=cry/sad",),
                ways=(
                    "{He} was so afraid that the tears began to fall.",
                    "{hero} cried in the dark and wished for a friend.",
                    "Poor {hero} could not sleep and cried [softly|quietly].",
                ),
            ),
            Beat(
                cast=("hero=stand|wave|sit/surprised|happy", "friend=hold/happy/lantern"),
                ways=(
                    "Then a warm light came in: it was {friend} with a lantern.",
                    '"Look, there is nothing there," said {friend}, and lit up the room.',
                    "{Friend} heard {him} and came with a bright lantern.",
                ),
            ),
            Beat(
                cast=("hero=sleep/sleepy", "friend=sit/happy|sleepy"),
                ways=(
                    "With {friend} [near|close by], {hero} fell asleep and was not afraid any more.",
                    "{Friend} stayed until {hero} was fast asleep.",
                    "The dark was not so bad with a friend, and soon {hero} slept.",
                ),
            ),
        ),
    ),
    "broken_kite": Arc(
        places_a=("beach", "park", "mountains", "farm"),
        places_b=("park", "beach"),
        times=("dddss", "ddsss", "ddddd"),
        beats=(
            Beat(
                cast=("hero=hold/delighted|happy/kite",),
                ways=(
                    "The wind was perfect, so {hero} took {his} kite to {place}.",
                    "{hero} could not wait to fly the new kite {at}.",
                    "Up, up! {hero} was going to fly {his} kite today.",
                ),
            ),
            Beat(
                cast=("hero=stand|point/sad|angry",),
                on_ground="kite",
                ways=(
                    "Crash! The kite fell to the ground and [broke|tore].",
                    "But a [gust|strong wind] threw the kite down, and now it was broken.",
                    "Oh no! The kite lay on the ground and would not fly.",
                ),
            ),
            Beat(
                cast=("hero=cry/sad", "friend=run|wave|point/surprised|happy"),
                on_ground="kite",
                ways=(
                    "{Friend} saw {hero} crying and came [over|to help].",
                    '"Do not cry," said {friend}. "I can mend it."',
                    "{hero} was in tears, but here came {friend}.",
                ),
            ),
            Beat(
                cast=("hero=sit|stand/happy|surprised", "friend=hold/happy/kite"),
                ways=(
                    "With some [tape|string] and patience, {friend} made the kite whole again.",
                    "{Friend} worked and worked, and then the kite was as good as new.",
                    "{hero} watched while {friend} fixed the kite.",
                ),
            ),
            Beat(
                cast=("hero=hold/delighted/kite", "friend=cheer|jump/delighted|happy"),
                ways=(
                    "It flew higher than ever, and both friends cheered!",
                    "{hero} flew the kite again, thanks to {friend}.",
                    "Now the kite was [even better|stronger] than before, and so was their friendship.",
                ),
            ),
        ),
    ),
    "rainy_day": Arc(
        places_a=("park", "town", "forest", "farm"),
        places_b=("park", "town", "farm", "beach"),
        times=("dddss", "ddddd", "ddsss"),
        beats=(
            Beat(
                cast=("hero=stand|sit/sad|angry",),
                weather="rain",
                ways=(
                    "It rained and rained, and {hero} got [very|terribly] wet.",
                    "{hero} wanted to play, but the rain would not stop.",
                    "What a grey day! {hero} stood {at} and [grumbled|sighed].",
                ),
            ),
            Beat(
                cast=("hero=stand|wave/surprised|happy", "friend=hold/happy/umbrella"),
                weather="rain",
                ways=(
                    "Then {friend} came along with a big umbrella.",
                    '"Come under my umbrella," [said|called] {friend}.',
                    "Who was that in the rain? It was {friend}, with a red umbrella!",
                ),
            ),
            Beat(
                cast=("hero=dance|jump/delighted|happy", "friend=dance|jump/delighted|happy"),
                weather="rain",
                ways=(
                    "Soon they forgot the rain and [danced|splashed] in the puddles.",
                    "The rain was not so bad now: {hero} and {friend} danced in it.",
                    "They laughed and jumped from puddle to puddle.",
                ),
            ),
            Beat(
                cast=("hero=point|cheer/surprised|delighted", "friend=stand|cheer/happy|delighted"),
                ways=(
                    "All at once the rain stopped and the sky [cleared|grew bright].",
                    '"Look, the sun!" [cried|said] {hero}.',
                    "At last the clouds went away, and {hero} cheered.",
                ),
            ),
            Beat(
                cast=("hero=sit/happy|sleepy", "friend=sit/happy|sleepy"),
                ways=(
                    "They sat down together to dry, and {hero} was glad it had rained.",
                    "Side by side they rested, the best of friends.",
                    "Wet and happy, {hero} and {friend} sat down to rest.",
                ),
            ),
        ),
    ),
    "new_friend": Arc(
        places_a=OUTSIDE,
        places_b=GREEN,
        times=("dddsn", "ddssn", "ddsss"),
        props=("ball", "book", "boat", "guitar", "kite"),
        beats=(
            Beat(
                cast=("hero=sit/sad",),
                ways=(
                    "{hero} sat all alone {at}, with nobody to play with.",
                    "It was [lonely|quiet] {at}, and {hero} felt sad.",
                    "New in the neighbourhood, {hero} did not know anyone yet.",
                ),
            ),
            Beat(
                cast=("hero=stand/scared|surprised", "friend=wave/happy"),
                ways=(
                    "Then {friend} came and said hello, but {hero} was [shy|too shy to answer].",
                    "Someone waved! It was {friend}, and {hero} did not know what to say.",
                    '"Hello!" said {friend}. {hero} was [startled|a little scared].',
                ),
            ),
            Beat(
                cast=("hero=stand|point/surprised", "friend=hold/happy/PROP"),
                ways=(
                    '"Would you like to see my {prop}?" asked {friend}.',
                    "{Friend} went and [fetched|brought] a {prop} to show.",
                    "A {prop}! {hero} came a little closer to look at what {friend} had.",
                ),
            ),
            Beat(
                cast=("hero=hold/delighted/PROP", "friend=cheer|jump/happy|delighted"),
                ways=(
                    "Now it was {hero}'s turn with the {prop}, and all shyness was gone.",
                    "{Friend} let {him} have the {prop}, and {hero} laughed for the first time that day.",
                    "They took turns, and {hero} had [great|so much] fun with the {prop}.",
                ),
            ),
            Beat(
                cast=("hero=sit|wave/happy", "friend=sit|wave/happy"),
                ways=(
                    "When the day ended, {hero} was not alone any more.",
                    "From that day on, {hero} and {friend} were friends.",
                    '"See you tomorrow!" said {friend}, and {hero} smiled [all evening|from ear to ear].',
                ),
            ),
        ),
    ),
    "a_gift_for_a_friend": Arc(
        places_a=("town", "bedroom", "kitchen"),
        places_b=OUTSIDE,
        times=("dddss", "ddssn", "ddsss"),
        beats=(
            Beat(
                cast=("hero=hold/happy|delighted/gift",),
                ways=(
                    "{hero} had wrapped a present, but it was not for {him}self.",
                    "A secret! {hero} had a gift for somebody special.",
                    "Today {hero} wanted to make somebody happy with a present.",
                ),
            ),
            Beat(
                cast=("hero=run/happy",),
                place="b",
                ways=(
                    "{He} hurried to {place} as fast as {his} legs could go.",
                    "Off {he} ran, all the way to {place}.",
                    "{hero} ran and ran, and did not stop once.",
                ),
            ),
            Beat(
                cast=("hero=wave|stand/happy|surprised", "friend=sit|cry/sad"),
                place="b",
                ways=(
                    "There was {friend}, looking very sad.",
                    "{Friend} had had a [bad|terrible] day and did not even look up.",
                    "But what was wrong with {friend}? {hero} wondered.",
                ),
            ),
            Beat(
                cast=("hero=stand|wave|point/happy", "friend=hold/surprised/gift"),
                place="b",
                ways=(
                    '"For me?" asked {friend}, holding the present.',
                    "{hero} gave {friend} the present and waited.",
                    "{Friend} could hardly believe it: a present, just like that!",
                ),
            ),
            Beat(
                cast=("hero=dance|cheer|jump/delighted", "friend=dance|cheer|jump/delighted"),
                place="b",
                ways=(
                    "{Friend} was happy again, and that was {hero}'s favourite present.",
                    "The sad day was forgotten, and the two of them [danced|celebrated].",
                    "Giving made {hero} just as happy as getting.",
                ),
            ),
        ),
    ),
    "the_concert": Arc(
        places_a=("bedroom", "kitchen", "farm"),
        places_b=("town", "park", "beach", "forest"),
        times=("ddssn", "dddsn", "dsssn"),
        beats=(
            Beat(
                cast=("hero=hold/happy|delighted/guitar",),
                ways=(
                    "Every day {hero} [practised|played] a new song on the guitar.",
                    "{hero} had a guitar and a [big|secret] dream: to play for others.",
                    "One more time {hero} played the song. Tonight was the concert!",
                ),
            ),
            Beat(
                cast=("hero=stand|sit/scared",),
                place="b",
                ways=(
                    "But when the time came, {he} was terribly nervous.",
                    '"What if I play it wrong?" {hero} thought, and [trembled|shivered].',
                    "At {place}, {his} knees began to shake.",
                ),
            ),
            Beat(
                cast=("hero=stand/scared|happy", "friend=wave|point|cheer/happy"),
                place="b",
                ways=(
                    '"You can do it!" said {friend}.',
                    "{Friend} came early to [give {him} courage|cheer {him} up].",
                    "Then {hero} saw {friend} in the first row, smiling.",
                ),
            ),
            Beat(
                cast=("hero=hold/happy|delighted/guitar", "friend=dance/delighted"),
                place="b",
                ways=(
                    "{hero} began to play, and {friend} began to dance.",
                    "And then the music came all by itself. {Friend} danced!",
                    "The first notes rang out, and nobody could sit still.",
                ),
            ),
            Beat(
                cast=("hero=cheer|jump/delighted", "friend=cheer/delighted|happy", "other=cheer|wave/delighted|happy"),
                place="b",
                ways=(
                    "{Friend} and {other} cheered. {hero} was a star!",
                    "Everyone wanted to hear it again, even {other}.",
                    "What a night! Even {other} [clapped|cheered], and {hero} would never be afraid again.",
                ),
            ),
        ),
    ),
    "the_cake": Arc(
        places_a=("kitchen",),
        places_b=("park", "beach", "farm", "forest"),
        times=("dddds", "dddss", "ddsss"),
        beats=(
            Beat(
                cast=("hero=hold/happy/book",),
                ways=(
                    "{hero} opened the big cookbook: today {he} would bake a cake.",
                    "In an old book {hero} found a recipe for the best cake in the world.",
                    '"I can do this," said {hero}, and read the recipe [twice|aloud].',
                ),
            ),
            Beat(
                cast=("hero=stand|point/angry|surprised|sad",),
                on_ground="cake",
                ways=(
                    "Splat! The cake slipped and landed on the floor.",
                    "Oh dear, {he} dropped it, and {hero} was very cross.",
                    "But the first cake fell down. All that work for nothing!",
                ),
            ),
            Beat(
                cast=("hero=stand|cry/sad", "friend=wave|point/happy"),
                ways=(
                    '"Let us try again, together," said {friend}.',
                    "Then {friend} came in and [offered|wanted] to help.",
                    "{Friend} heard the noise and came to cheer {him} up.",
                ),
            ),
            Beat(
                cast=("hero=hold/delighted/cake", "friend=cheer|jump/delighted|happy"),
                ways=(
                    "This time the cake was perfect, with a candle on top!",
                    "They stirred and baked, and out came a wonderful cake.",
                    "{hero} held up the new cake, and {friend} cheered.",
                ),
            ),
            Beat(
                cast=("hero=sit/happy|delighted", "friend=sit/happy|delighted"),
                place="b",
                on_ground="cake",
                ways=(
                    "They took it to {place} and had a picnic, just the two of them.",
                    "Everything tastes better outside, so they ate it {at}.",
                    "That evening {hero} and {friend} shared the cake {at}.",
                ),
            ),
        ),
    ),
    "the_quarrel": Arc(
        places_a=("park", "beach", "farm", "forest"),
        places_b=("bedroom", "kitchen", "town"),
        times=("dddss", "ddssn", "ddsss"),
        props=("ball", "book", "boat"),
        beats=(
            Beat(
                cast=("hero=stand|jump/happy", "friend=stand|jump|wave/happy"),
                on_ground="PROP",
                ways=(
                    "{hero} and {friend} wanted to play with the {prop}.",
                    "There was only one {prop}, and both {hero} and {friend} wanted it.",
                    "It started as a [lovely|perfect] day for {hero} and {friend}.",
                ),
            ),
            Beat(
                cast=("hero=point|stand/angry", "friend=stand|point/angry"),
                on_ground="PROP",
                ways=(
                    '"It is mine!" "No, mine!" They [shouted|quarrelled] and would not stop.',
                    "Soon they were quarrelling about whose turn it was.",
                    "{hero} was cross with {friend}, and {friend} was cross with {hero}.",
                ),
            ),
            Beat(
                cast=("hero=sit|cry/sad",),
                place="b",
                ways=(
                    "{hero} went away and sat down alone, feeling [awful|sorry].",
                    "Alone, {hero} felt very sad about the quarrel.",
                    "It was no fun without {fhim}, and {hero} was sorry.",
                ),
            ),
            Beat(
                cast=("hero=stand/surprised", "friend=hold/sad|happy/PROP"),
                place="b",
                ways=(
                    "Then {friend} came with the {prop} and said sorry.",
                    '"You can have it," said {friend}, holding out the {prop}.',
                    "Who was there? {Friend}, and {fhe} had brought the {prop}.",
                ),
            ),
            Beat(
                cast=("hero=dance|jump|cheer/delighted", "friend=dance|jump|cheer/delighted"),
                place="b",
                ways=(
                    "They made up and laughed about the silly quarrel.",
                    "Friends again! A {prop} is for sharing.",
                    "{hero} said sorry too, and then they played [until dark|together].",
                ),
            ),
        ),
    ),
    "lost_in_the_woods": Arc(
        places_a=("forest", "mountains"),
        places_b=("bedroom", "kitchen"),
        times=("dsnnn", "ddsnn", "dssnn"),
        beats=(
            Beat(
                cast=("hero=run|dance/happy|delighted",),
                ways=(
                    "{hero} went for a walk {at} and sang a song.",
                    "Off into the wild! {hero} was looking for adventure {at}.",
                    "{hero} ran deeper and deeper into {place}.",
                ),
            ),
            Beat(
                cast=("hero=point|stand/scared|surprised",),
                ways=(
                    "But which way was home? Everything looked the same.",
                    "After a while {he} did not know the way any more.",
                    "{hero} stopped. [This path|That tree] was strange to {him}.",
                ),
            ),
            Beat(
                cast=("hero=cry/sad",),
                ways=(
                    "{He} was lost, and cried bitterly.",
                    '"I want to go home," [sobbed|wept] {hero}.',
                    "Lost and alone, {hero} began to cry.",
                ),
            ),
            Beat(
                cast=("hero=wave|jump/surprised|happy", "friend=hold/happy/lantern"),
                ways=(
                    "A light shone in the distance: {friend} had come with a lantern!",
                    '"There you are!" called {friend}, holding up a lantern.',
                    "{Friend} had been searching for {him} with a lantern.",
                ),
            ),
            Beat(
                cast=("hero=sleep/sleepy", "friend=sit|wave/happy|sleepy"),
                place="b",
                ways=(
                    "Safe at home, {hero} was asleep at once.",
                    "{Friend} took {him} home, where {he} slept [like a log|until morning].",
                    "Home at last! {hero} slept and {friend} watched over {him}.",
                ),
            ),
        ),
    ),
    "the_bedtime_book": Arc(
        places_a=("bedroom",),
        places_b=("bedroom",),
        times=("snnnn", "ssnnn", "nnnnn"),
        beats=(
            Beat(
                cast=("hero=sit|stand/angry|sad",),
                ways=(
                    "{hero} could not sleep at all.",
                    "It was late, but {hero} was wide awake and grumpy.",
                    '"I am not tired!" said {hero}, and [turned|rolled] over once more.',
                ),
            ),
            Beat(
                cast=("hero=stand|point/surprised", "friend=hold/happy/book"),
                ways=(
                    "So {friend} came with a [thick|big] book.",
                    '"Shall I read to you?" asked {friend}.',
                    "{Friend} had an idea and fetched {fhis} favourite book.",
                ),
            ),
            Beat(
                cast=("hero=sit/happy|delighted", "friend=hold/delighted|happy/book"),
                ways=(
                    "It was a [funny|merry] story, and {hero} laughed.",
                    "{Friend} read of pirates and dragons, and {hero} listened.",
                    "Page after page, the story got better and better.",
                ),
            ),
            Beat(
                cast=("hero=sit/sleepy", "friend=hold/sleepy|happy/book"),
                ways=(
                    "By the last page {his} eyes were growing heavy.",
                    "{hero} yawned. Just one more page!",
                    "Slowly, {hero} grew [tired|sleepier and sleepier].",
                ),
            ),
            Beat(
                cast=("hero=sleep/sleepy", "friend=sleep/sleepy"),
                ways=(
                    "Soon both of them were fast asleep.",
                    "Nobody heard the end of the story, because {friend} slept too.",
                    "{hero} and {friend} dreamed the rest of the story.",
                ),
            ),
        ),
    ),
    "the_balloon": Arc(
        places_a=("town", "park", "farm"),
        places_b=OUTSIDE,
        times=("dddsn", "ddsss", "dddss"),
        beats=(
            Beat(
                cast=("hero=hold/delighted|happy/balloon",),
                ways=(
                    "{hero} got a balloon as blue as the sky.",
                    "At the fair, {hero} chose the biggest balloon of all.",
                    "How proud {hero} was of {his} blue balloon!",
                ),
            ),
            Beat(
                cast=("hero=hold/surprised|sad/balloon", "friend=cry/sad"),
                place="b",
                ways=(
                    "On the way {he} met {friend}, who was crying.",
                    "But there was {friend}, in tears. {Fhis} own balloon had flown away.",
                    'Then {hero} saw {friend}. "Why are you crying?" {he} asked.',
                ),
            ),
            Beat(
                cast=("hero=wave|stand|point/happy", "friend=hold/surprised/balloon"),
                place="b",
                ways=(
                    '"You can have mine," said {hero}.',
                    "{hero} thought for a moment and gave the balloon away.",
                    "Without a word, {hero} put the balloon into {fhis} hand.",
                ),
            ),
            Beat(
                cast=("hero=jump|cheer|dance/happy|delighted", "friend=hold/delighted/balloon"),
                place="b",
                ways=(
                    "{Friend} laughed again, and {hero} jumped for joy.",
                    "What a smile! {Friend} was the happiest of all.",
                    "To see {fhim} happy was worth more than a balloon.",
                ),
            ),
            Beat(
                cast=("hero=sit/happy|sleepy", "friend=sit/happy|sleepy"),
                place="b",
                ways=(
                    "Side by side they sat together and talked for hours.",
                    "A balloon may fly away, but a friend stays.",
                    "They rested side by side, and {hero} did not miss {his} balloon.",
                ),
            ),
        ),
    ),
    "the_race": Arc(
        places_a=("beach", "park", "farm", "mountains"),
        places_b=("town", "park", "forest"),
        times=("dddss", "ddsss", "ddddd"),
        beats=(
            Beat(
                cast=("hero=run/happy", "friend=run/happy"),
                ways=(
                    "Ready, steady, go! {hero} raced against {friend}.",
                    '"I bet I am faster," said {hero}, and {friend} laughed.',
                    "It was the day of the big race {at}: {hero} against {friend}!",
                ),
            ),
            Beat(
                cast=("hero=run/delighted|happy",),
                ways=(
                    "{hero} was in front! The finish was not far.",
                    "Nobody was as fast as {hero} today.",
                    "{He} ran like the wind and could already see the finish.",
                ),
            ),
            Beat(
                cast=("hero=stand|point/surprised|scared", "friend=cry/sad"),
                ways=(
                    "But behind {him}, {friend} had fallen and was crying.",
                    "Then {he} heard a cry. {Friend} had hurt {fhis} knee!",
                    "Oh no, {friend} was down. {hero} turned around at once.",
                ),
            ),
            Beat(
                cast=("hero=run/happy", "friend=run/happy|surprised"),
                place="b",
                ways=(
                    '"We will finish together," said {hero}.',
                    "{hero} helped {fhim} up, and they ran on side by side.",
                    "Hand in hand they went on, slowly at first and then faster.",
                ),
            ),
            Beat(
                cast=("hero=cheer/delighted", "friend=cheer/delighted", "other=wave|cheer|dance/happy|delighted"),
                place="b",
                ways=(
                    "Both of them won, and {other} cheered the loudest.",
                    "{Other} gave them the cup: two winners this year!",
                    "They crossed the line together while {other} was waiting.",
                ),
            ),
        ),
    ),
    "the_treasure": Arc(
        places_a=("bedroom", "kitchen", "town"),
        places_b=("beach", "forest", "mountains", "farm"),
        times=("ddssn", "dddsn", "ddsss"),
        beats=(
            Beat(
                cast=("hero=hold/surprised/book",),
                ways=(
                    "In an old book, {hero} found a map of a treasure!",
                    "A map fell out of {hero}'s book. A treasure map!",
                    "{hero} read of a treasure hidden {at_b}.",
                ),
            ),
            Beat(
                cast=("hero=run|point/happy|delighted",),
                place="b",
                ways=(
                    "{He} set out [at once|right away] to look for it.",
                    "Off {he} went to {place}, as the map said.",
                    "The map led {hero} straight to {place}.",
                ),
            ),
            Beat(
                cast=("hero=stand|jump|point/surprised",),
                place="b",
                on_ground="gift",
                ways=(
                    "And there it was, a [mysterious|purple] box!",
                    "What was that on the ground? The treasure!",
                    "{hero} rubbed {his} eyes. A box with a bow, just as in the book!",
                ),
            ),
            Beat(
                cast=("hero=hold/delighted/gift", "friend=wave|point|jump/surprised|happy"),
                place="b",
                ways=(
                    "{hero} picked it up, and here came {friend}, who was curious.",
                    '"Open it!" called {friend}.',
                    "{Friend} wanted to know what was inside.",
                ),
            ),
            Beat(
                cast=("hero=dance|cheer/delighted", "friend=hold/delighted/lantern|balloon|ball"),
                place="b",
                ways=(
                    "It was full of [toys|wonderful things], and {he} shared them with {friend}.",
                    "There was something for {friend} too. What an adventure!",
                    "They shared the treasure, for that is what friends do.",
                ),
            ),
        ),
    ),
}

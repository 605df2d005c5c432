"""The phrase book of the synthetic posts: what people write when a criterion is matched, and when it is not."""

import re
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True, slots=True)
class Phrasings:
    """Templates of one (symptom, kind): those that the tiny base saw in pre-training, and those held out from it."""

    seen: tuple[str, ...]
    held_out: tuple[str, ...]


@cache
def phrase_book() -> dict[tuple[str, str], Phrasings]:
    """(symptom, kind) -> phrasings, read from `_PHRASE_BOOK`; neutral ones stand under FILLER and STUB."""
    book: dict[tuple[str, str], Phrasings] = {}
    for section in re.split(r"^\[", _PHRASE_BOOK, flags=re.MULTILINE)[1:]:
        title, *lines = [line for line in section.splitlines() if line]
        symptom, kind = title.rstrip("]").split()
        seen = tuple(line for line in lines if not line.startswith("~"))
        book[symptom, kind] = Phrasings(seen, tuple(line[2:] for line in lines if line.startswith("~")))
    return book


# One phrasing per line; {a|b} is a choice, {who} and {over} are slots, "~" marks a phrasing held out from pre-training.
# Mild on purpose: no methods, no graphic detail.
_PHRASE_BOOK = """
[DEPRESSED_MOOD evidence]
I feel {so|really|very} {sad|sad and empty|low}
I {feel|am} {down|empty|sad} {all day|from morning to night|most of the time}
everything {feels|seems} {hopeless|grey and hopeless|sad and pointless}
I {cry|end up crying} {for no reason|in the car|almost every evening}
my mood is {very low|at the bottom|lower than ever}
there is {an emptiness|a sadness} in me that {will not lift|does not go away}
I have {no hope|lost all hope} that {things|life} will get better
I am {unhappy|in a dark place|in a bad mood} {all the time|for no reason}
I have {tears in my eyes|been crying} {since this morning|again}
I feel {numb and sad|lonely and sad|hopeless} {inside|even with friends}
nothing makes me {happy|smile} and I {see no hope|feel awful}
~ I keep {tearing up|bursting into tears} over {nothing|small things}
~ a {heavy|dark} cloud {hangs over me|follows me around}
~ I {see no|cannot see any} {light ahead|bright side to anything}
~ it is all {gloomy|bleak} inside and nothing cheers me up
~ I am {miserable|deeply unhappy} {no matter what happens|even on good days}
~ my heart {feels heavy|aches} {when I wake up|whatever I do}
~ I {walk around|sit here} with {a lump in my throat|wet eyes} and {no hope|so much sadness}

[DEPRESSED_MOOD negated]
I do not feel {sad|down|empty}
my mood is {good|fine|steady}
I am not {sad|low|down} at all
I have {no reason to cry|plenty of hope}
I {smile|laugh} a lot and {feel happy|am in a good mood}
no {tears|sadness} here, I {am happy|feel hopeful}
~ I feel {cheerful|hopeful} {about things|when I wake up}
~ I am {in good spirits|in a sunny mood} {most of the time|even on bad days}
~ it is not {gloom|unhappiness} that {I write about|brings me here}

[DEPRESSED_MOOD third_person]
{who} {feels|is} {so sad|sad and empty|down most of the time}
{who} {cries|ends up crying} {for no reason|almost every evening}
{who} says that everything {feels|seems} hopeless
{who} is in {a dark place|a bad mood} all the time
~ {who} keeps {tearing up|bursting into tears} over {nothing|small things}
~ a {heavy|dark} cloud follows {who} around
~ I worry because {who} seems {miserable|deeply unhappy}

[DEPRESSED_MOOD past]
I used to {feel so sad|feel empty|cry almost every evening}, {over}
{last year|two years ago} {my mood was very low|I felt hopeless}, {over}
~ back in school I was {miserable|deeply unhappy}, {over}
~ there was a time when {a dark cloud followed me around|nothing cheered me up}, {over}

[ANHEDONIA evidence]
I {do not|no longer} enjoy {anything|my hobbies|the things I loved}
nothing {is fun|gives me joy|interests me} any more
I have lost {all interest|interest} in {my hobbies|music|my friends}
I do not care about {anything|my hobbies|the things I loved}
I {get|feel} no {joy|pleasure} from {anything|music|seeing friends}
I used to love {painting|football|cooking}, now {I do not care|it means nothing to me}
I {stopped|quit} {playing|painting|reading} because it {is no fun|bores me} now
{music|painting|my favourite game} is {boring|dull} {to me now|and I do not care}
I {have no wish|am not excited} to {see friends|play|go out} any more
I feel {nothing|no excitement} when I {play|read|meet friends}
~ my {guitar|camera|sketchbook} {gathers dust|lies in a corner} because I {cannot be bothered|see no point in it}
~ even {my favourite show|a day at the sea|good news} leaves me {cold|numb}
~ I {skip|turn down} every {party|trip|game} because it all feels flat
~ {games|books|parties} that once {thrilled me|made my week} are just dull to me
~ I {go through the motions|sit through the evening} without a spark of {delight|excitement}
~ I {gave up on|dropped} {my choir|my team|the garden} because the fun is gone

[ANHEDONIA negated]
I still enjoy {my hobbies|music|the things I loved}
I have not lost interest in {my hobbies|music|my friends}
{music|cooking|football} still gives me joy
I {love|enjoy} {playing|reading|seeing friends} {as much as ever|every weekend}
I {am happy|am excited} to {see friends|play|go out}
~ I {look forward to|am excited about} {the weekend|the next game|my trip}
~ {my guitar|the garden|my choir} never {bores me|leaves me cold}
~ I had {a great time|so much fun} {at the party|with my team}

[ANHEDONIA third_person]
{who} {does not enjoy|no longer enjoys} {anything|music|hobbies}
{who} has lost interest in {music|friends|football}
{who} says that nothing is fun any more
{who} {stopped|quit} {playing|painting|reading} because it is boring
~ even good news leaves {who} {cold|numb}
~ {who} {skips|turns down} every {party|trip|game}
~ {who} finds {books|games|parties} dull now

[ANHEDONIA past]
I used to {enjoy nothing|care about nothing}, {over}
{last year|two years ago} {nothing was fun|I lost interest in everything}, {over}
~ back in school every {party|game} left me cold, {over}
~ there was a time when my {guitar|camera} gathered dust, {over}

[APPETITE_CHANGE evidence]
I {have no appetite|barely eat|do not want to eat}
I {eat|am eating} {all the time|far too much|much more than before}
I have {lost|gained} {a lot of weight|ten pounds|five kilos} without trying
my appetite is {gone|out of control|much bigger than before}
I {forget|have no wish} to eat {lunch|dinner|all day}
food {does not interest me|makes me feel sick}
I {skip|miss} {breakfast|lunch|most meals} because I am {never hungry|not hungry}
I am {hungry all day|always hungry} and {eat sweets|keep eating} {all night|without a break}
my clothes {are too big|do not fit} because I {lost|gained} weight
my weight {goes up|goes down} {every week|and I do not know why}
~ I {push my plate away|leave my plate full} {at every meal|after two bites}
~ my {jeans|trousers} are {falling off me|suddenly too tight} and I did not plan it
~ I {snack|binge} {until my stomach hurts|from noon to midnight}
~ the scale {keeps dropping|keeps climbing} {by itself|although I changed nothing}
~ I {live on|get by on} {a few crackers|toast and tea} because nothing tastes right
~ I {raid the fridge|order pizza} {again and again|three times a night}

[APPETITE_CHANGE negated]
my appetite is {fine|normal|good}
I eat {well|normally|three times a day}
I have not {lost|gained} any weight
I am hungry {at noon|at meal times} and {enjoy my lunch|eat my lunch}
my weight {is stable|stays the same}
~ I {clean my plate|finish my plate} {at every meal|with pleasure}
~ my {jeans|trousers} fit {as ever|the same as before}
~ the scale {shows the same|has not moved} {month after month|since spring}

[APPETITE_CHANGE third_person]
{who} {has no appetite|barely eats}
{who} {eats all the time|eats far too much}
{who} has {lost|gained} a lot of weight
{who} skips {breakfast|lunch|most meals}
~ {who} {pushes the plate away|leaves a full plate} at every meal
~ {who} {snacks|binges} from noon to midnight
~ {who} {gets by|lives} on {crackers|toast and tea}

[APPETITE_CHANGE past]
I used to {eat far too much|barely eat}, {over}
{last year|two years ago} I {lost|gained} a lot of weight, {over}
~ back in school I {left my plate full|raided the fridge}, {over}
~ there was a time when the scale kept {dropping|climbing}, {over}

[SLEEP_ISSUES evidence]
I {cannot|can not} {sleep|fall asleep} {at night|until four}
I {lie|am} awake {until three|half the night|for hours}
I sleep {only three hours|so badly|far too much|twelve hours a day}
I wake up {at four|every hour} and cannot {sleep|get back to sleep}
my sleep is {terrible|broken|a mess}
I have {insomnia|trouble sleeping} {every night|again}
I {hardly|barely} {sleep|rest} and {am up|walk around} {all night|until morning}
I {stay awake|am up} {all night|past midnight} {in bed|with my thoughts}
I {sleep through|oversleep} {every alarm|the whole morning} and stay in bed {all day|until noon}
I {dread|fear} the night because {sleep does not come|I lie there with my eyes open}
~ I {stare at the ceiling|toss and turn} {until sunrise|night after night}
~ I {count sheep|watch the clock} {till dawn|past midnight} with my eyes wide open
~ I {doze|stay in bed} {past noon|through the whole day} and miss everything
~ my nights are {short and restless|one long wait for the alarm}
~ I {nod off|drift off} {at sunrise|around five} and not a minute before
~ I {snooze|slumber} {fourteen|fifteen} hours and still {hide under the blanket|cannot get out of bed}

[SLEEP_ISSUES negated]
I sleep {fine|well|all night}
my sleep is {good|fine|normal}
I have no trouble {sleeping|falling asleep}
I fall asleep {fast|in five minutes} and {rest|sleep} {until the alarm|all night}
my nights are {good|fine} and I wake up {rested|at seven}
~ I {nod off|drift off} {within minutes|as soon as I lie down}
~ my nights are {calm|quiet} and I {rest well|get my eight hours}
~ no {tossing and turning|staring at the ceiling} for me

[SLEEP_ISSUES third_person]
{who} cannot {sleep|fall asleep} {at night|until four}
{who} {lies awake|is awake} {half the night|for hours}
{who} has {insomnia|trouble sleeping}
{who} {barely sleeps|is up all night} and stays in bed until noon
~ {who} {stares at the ceiling|tosses and turns} {until sunrise|night after night}
~ {who} {dozes|stays in bed} past noon
~ {who} {watches the clock|counts sheep} till dawn

[SLEEP_ISSUES past]
I used to {lie awake for hours|sleep so badly}, {over}
{last year|two years ago} I {could not sleep|had insomnia}, {over}
~ back in school I {tossed and turned|stared at the ceiling} until sunrise, {over}
~ there was a time when I {counted sheep till dawn|dozed past noon}, {over}

[PSYCHOMOTOR evidence]
I {move|walk|speak} {so slowly|slower than before|in slow motion}
I cannot {sit|keep|stand} still {for a minute|at all}
I am so restless that I {pace|walk} {around the room|up and down}
my body {feels|is} {slowed down|so slow}
{my movements are|my speech is} {slow|very slow} and people {notice|ask about it}
I {pace|walk up and down} {all evening|for hours} because I am restless
I {tap|shake|move} my {legs|hands|feet} all the time and cannot stop
I need {an hour|so long} to {dress|walk to the door|answer} because I am so slow
I {get up|walk off} {every minute|again and again} because I cannot {sit|stay} in a chair
I {talk|answer} so slowly that {people wait for me|my friends finish my words}
~ I {fidget|squirm} {on every chair|through every meeting} and {tap my feet|wring my hands}
~ it takes me {ages|forever} to {lift a cup|button a shirt|finish a sentence}, as if I were {under water|made of lead}
~ my {legs bounce|hands fidget} {nonstop|the whole time} and I have to get up {again and again|every minute}
~ people {say|tell me} that I {drag my feet|talk like a slow tape}
~ I {creep|shuffle} through the {flat|office} like a {snail|very old man}

[PSYCHOMOTOR negated]
I can {sit|keep|stand} still {for hours|with no trouble}
I am not restless {at all|or slow}
I {move|walk|speak} {at a normal pace|as fast as before}
I sit {in my chair|in meetings} {calmly|quietly} and {do not pace|do not move about}
my {legs|hands} are {still|quiet} when I {sit|wait}
~ my {hands|legs} are {calm|steady} and I do not {fidget|squirm}
~ I am {quick|nimble} {on my feet|with my hands}
~ nobody says that I {drag my feet|talk like a slow tape}

[PSYCHOMOTOR third_person]
{who} {moves|walks|speaks} {so slowly|in slow motion}
{who} cannot {sit|keep} still
{who} is restless and {paces|walks} up and down
{who} {taps|moves} {the legs|both feet} all the time
~ {who} {fidgets|squirms} on every chair
~ {who} {creeps|shuffles} through the flat like a snail
~ it takes {who} ages to {lift a cup|finish a sentence}

[PSYCHOMOTOR past]
I used to {pace for hours|move so slowly}, {over}
{last year|two years ago} I could not {sit|keep} still, {over}
~ back in school I {fidgeted|squirmed} on every chair, {over}
~ there was a time when I {dragged my feet|talked like a slow tape}, {over}

[FATIGUE evidence]
I am {so tired|tired all the time|exhausted}
I have no {energy|strength} {left|for anything|to get up}
I feel {exhausted|worn out|tired} {after every small thing|all day}
{a shower|the dishes|getting dressed} {takes|costs} all my {energy|strength}
I {do not have the energy|am too tired} {to work|to cook|to go out}
my energy is {gone|at zero|used up}
I {need a rest|have to lie down} after {a short walk|the stairs|making tea}
I am {weak|too weak} and {heavy|tired} {from the moment I get up|by lunch}
{small tasks|simple chores} {exhaust me|wear me out} {in minutes|completely}
I {run out of|have run out of} {power|energy|fuel} {by lunch|before I start}
~ I am {wiped out|running on fumes} {by noon|before the day begins}
~ my {arms|legs} feel {like lead|heavy as stone} after {one flight of stairs|a trip to the shop}
~ I {collapse|slump} {on the sofa|into a chair} {after every errand|at five}
~ I am {drained|spent}, {whatever I do|no matter how much coffee I drink}
~ my batteries are {flat|empty} and a {short walk|phone call} {flattens me|is too much}
~ even {brushing my hair|making tea} {leaves me drained|is like climbing a hill}

[FATIGUE negated]
I have {plenty of energy|enough energy} {for work|for everything}
I am not tired {at all|or worn out}
I feel {rested|strong|full of energy}
I {jump|get} out of bed full of {power|energy}
{small tasks|long walks} {are easy|do not wear me out} and I {feel fit|feel strong}
~ I am {fresh|wide awake} {by noon|after a long day}
~ I {climb|run up} the stairs {with ease|and feel great}
~ my batteries are {full|charged} {by morning|for the day}

[FATIGUE third_person]
{who} is {so tired|tired all the time|exhausted}
{who} has no {energy|strength} {left|for anything}
{who} feels worn out {all day|after every small thing}
{who} {needs a rest|has to lie down} after a short walk
~ {who} is {wiped out|running on fumes} by noon
~ {who} {collapses|slumps} on the sofa after every errand
~ {who} looks {drained|spent} whatever happens

[FATIGUE past]
I used to be {tired all the time|exhausted}, {over}
{last year|two years ago} I had no {energy|strength}, {over}
~ back in school I was {wiped out|drained} by noon, {over}
~ there was a time when my {batteries were flat|legs felt like lead}, {over}

[WORTHLESSNESS evidence]
I {feel|am} {worthless|useless|like a failure}
I am {a burden|nothing but a burden} to {everyone|my family|my friends}
I {hate|blame} myself for {everything|every mistake|being like this}
I feel {so guilty|guilty} about {everything|every mistake|small things}
everything is my fault
I {am not good enough|am worth nothing|let everyone down}
I think that I {am a bad person|deserve nothing good}
I am {ashamed of|disappointed in} {myself|who I am}
{nobody needs|no one should love} {someone like me|a person like me}
I {ruin|spoil} {everything|every friendship} and {it is my fault|I am to blame}
I am {stupid|bad|no good} and {others are better|my friends deserve better}
~ I {apologise|say sorry} {for existing|for everything} because I {ruin it all|mess up whatever I touch}
~ {the others|my people} would be {better off|happier} with {a better son|a better friend} than me
~ I {look in the mirror|think of myself} and see {a total disappointment|someone of no value}
~ I {beat myself up|cannot forgive myself} over {an old email|a silly joke|things from years ago}
~ I {amount to nothing|am a waste of space} {next to my classmates|compared to everyone}
~ I {carry|drag around} so much shame for {who I am|things that nobody else remembers}

[WORTHLESSNESS negated]
I do not feel {worthless|useless|guilty}
I am not {a burden|a failure} to {anyone|my family}
I know that it is not my fault
I am {proud of|happy with} {myself|my work} and {feel useful|feel valued}
I do not {blame|hate} myself for {mistakes|that}
~ I {like who I am|am proud of myself}
~ I {forgive myself|do not beat myself up} over {an old email|a silly joke}
~ I know {my own worth|that I am good enough} {as a friend|at my job}

[WORTHLESSNESS third_person]
{who} feels {worthless|useless|like a failure}
{who} feels like a burden to everyone
{who} {takes the blame|feels guilty} for {everything|every mistake}
{who} is ashamed and thinks that {others are better|nobody needs a person like that}
~ {who} {apologises|says sorry} {for existing|for everything}
~ {who} sees {a total disappointment|someone of no value} in the mirror
~ {who} carries so much shame

[WORTHLESSNESS past]
I used to {feel worthless|feel like a burden|hate myself}, {over}
{last year|two years ago} I {felt guilty about everything|blamed myself}, {over}
~ back in school I {beat myself up|apologised} for everything, {over}
~ there was a time when I {felt of no value|was full of shame}, {over}

[COGNITIVE_ISSUES evidence]
I cannot {concentrate|focus|think straight} {at work|on anything|in class}
I {cannot|am unable to} {decide|make up my mind} {what to do|what to wear}
I have trouble {concentrating|thinking|focusing} {at work|on anything}
my {head|brain} is {foggy|so slow to think|full of fog}
I {forget everything|cannot remember anything} {that I read|I am told}
every {small|simple} decision {is too hard|takes me hours}
I {read|listen} but {nothing stays in my head|I cannot follow}
my {mind|head} is {blank|empty|somewhere else} {in class|when I work|when I read}
I {start|begin} {a task|a book|a sentence} and {forget what I was doing|lose my place}
I {go back and forth|think for hours} over {every choice|what to buy} and cannot {choose|decide}
~ I read {one page|the same line} {ten times|over and over} and {nothing sticks|take in not a word}
~ my thoughts {slip away|scatter} {in the middle of a sentence|before I can use them}
~ I {stand in front of|stare at} {the shelf|the menu} and {cannot pick|go back and forth forever}
~ I {lose the thread|zone out} {in every meeting|when people talk to me}
~ my mind {goes blank|wanders off} {when I open my laptop|during every lecture}
~ {picking a film|choosing a sandwich} {paralyses me|turns into a puzzle I cannot solve}

[COGNITIVE_ISSUES negated]
I can {concentrate|focus} {well|at work|with no trouble}
my {head|mind} is clear
I have no trouble {thinking|making decisions}
I {read|listen} and {remember it all|follow with no effort}
I {choose|decide} {quickly|in a minute} and my mind {is sharp|stays on the task}
~ my thoughts are {sharp|in order} {in every meeting|when I open my laptop}
~ I {follow every lecture|read whole books} {with ease|without losing the thread}
~ {picking a film|choosing a sandwich} takes me {a second|no time}

[COGNITIVE_ISSUES third_person]
{who} cannot {concentrate|focus} {at work|on anything}
{who} cannot {decide|make decisions}
{who} has trouble thinking
{who} {starts a task|begins a sentence} and forgets it
~ {who} {loses the thread|zones out} in every meeting
~ {who} reads the same line {ten times|over and over}
~ {who} stares at the menu and cannot pick

[COGNITIVE_ISSUES past]
I used to have trouble {concentrating|thinking}, {over}
{last year|two years ago} I could not {concentrate|focus|decide}, {over}
~ back in school I {zoned out|lost the thread} in every lecture, {over}
~ there was a time when my {mind went blank|thoughts scattered}, {over}

[SUICIDAL_THOUGHTS evidence]
I {do not want to|no longer want to} {live|be alive|be here}
I {think|keep thinking} about {death|dying|being dead}
I {wish|keep wishing} I {was dead|would not wake up|had never been born}
I have thoughts {of death|of dying} {every day|again}
I {want|would like} to {die|disappear for good}
I feel that life is not worth living
I {would rather|want to} {be dead|not exist|be gone}
the world would be {better|fine} without me and I {want to be gone|do not want to stay}
I {see no reason|have no reason} to {live|stay alive|go on living}
I {hope|wish} that I {never wake up|do not wake up|could just be gone}
~ I {hope|pray} {at bedtime|each evening} that {there is no tomorrow for me|morning never comes for me}
~ part of me {longs|would be relieved} to {leave this world|not exist}
~ I {picture|imagine} {my own funeral|the world without me} {more often than I admit|far too often}
~ I am {done with|tired of} {being alive|existing} and {do not want to go on|see no reason to stay}
~ it would be {easier|fine by me} if I {simply ceased to exist|were gone for ever}
~ I {daydream about|find comfort in the idea of} {not being around|never waking again}

[SUICIDAL_THOUGHTS negated]
I {do not want to die|want to live}
I have no thoughts of {death|dying}
I am glad {to be alive|to be here}
I {love|value} {my life|being alive} and want to {stay|grow old}
I {do not|never} wish {to be dead|to be gone}
~ I {would never|do not} want to leave this world
~ I have {every reason to stay|so much to live for}
~ being alive {feels good|is something I treasure}

[SUICIDAL_THOUGHTS third_person]
{who} {does not want to live|wants to die}
{who} {thinks|keeps thinking} about {death|dying}
{who} said that life is not worth living
{who} {wishes|hopes} not to wake up
~ {who} is {done with|tired of} existing
~ {who} told me {about not wanting to be around|that it would be easier not to exist}
~ I am scared because {who} longs to leave this world

[SUICIDAL_THOUGHTS past]
I used to {think about death|wish I would not wake up}, {over}
{last year|two years ago} I {wanted to die|had thoughts of death}, {over}
~ back in school I {pictured the world without me|wanted to leave this world}, {over}
~ there was a time when I {longed not to exist|saw no reason to stay}, {over}

[FILLER neutral]
I {work|have a job} in {a shop|an office|a school|a small town}
{my class|my shift|the course} starts {at eight|on Monday|next week}
we {moved|came} here {last spring|two years ago|for my job}
the {bus|train} was late {again|this morning|on Friday}
my {phone|laptop|car} is {old|broken|at the repair shop}
I {posted|wrote} here {once before|last month|under another name}
{thanks|thank you} for {reading|any advice|letting me write this}
does anyone have {a tip|advice|a similar story}?
I am {twenty|thirty two|in my forties} and live {alone|with my family|in the city}
it {rained|was sunny} {all day|the whole weekend|on my birthday}
my {mother|aunt|neighbour} {called|visited} {on Sunday|last week|after lunch}
the {dog|cat} {wants to go out|chased a bird|sat on my keyboard}
I {have|prepare for} {an exam|an interview|a meeting} {on Tuesday|soon|next month}
we watched {a film|the game|a long series} {at home|last night|with the neighbours}
my {landlord|boss|teacher} {sent a letter|changed the plan|wants an answer}
I {bought|painted|fixed} {a chair|the old desk|a shelf} {yesterday|for the kitchen}
the {doctor|counsellor} can see me {in May|next week|after the holidays}
I have been {on the phone|in town|at the office} {all morning|since nine}
my {parents|friends} live {far away|in another country|two streets down}
there is {a park|a lake|a library} {near my house|behind the station}
I do not know {where to post this|how this forum works|who else to ask}
{rent|petrol|everything} is {getting expensive|more than I planned}
the {soup|bread|cake} at the corner shop is {good|cheap|sold out by ten}
the {film|song|book} was {sad|dark|a bit empty} but {well made|worth it}
the {battery|signal|volume} is {low|down} {again|as usual}
my {phone|printer} {died|went dead} {on the bus|in the middle of a call}
the {shop|street} was {empty|slow|half asleep} {this morning|on Friday}
I {changed|lost} my {password|keys|ticket} {last week|and had to wait}
the {cat|baby next door} {sleeps|eats} {all day|whenever it wants}
my {sister|brother} is {getting married|learning Spanish|coming to visit} {in June|soon}
we {talked|argued} about {money|the holidays|politics} {for an hour|over lunch}
I {took|missed} the {early train|last bus} and {read a paper|met an old neighbour}
the {kitchen|hall|roof} needs {new paint|a repair|cleaning} {before winter|at some point}
{long story short|in short}, {the plan changed|we had to start over|it went on for months}
I {started|joined} {a course|a new project} {in March|after the holidays} and {it is going on|it ends soon}
this is {a long post|my second post|a throwaway account}, {sorry|bear with me}
{my manager|the office} {asked for|wants} the {papers|numbers} {by Thursday|before lunch}
{tomorrow|on Saturday} we {drive|go} to {the coast|my uncle's place|the market}

[STUB neutral]
{any advice|anyone else|is this normal}?
{first post here|just posting|hello everyone|hi all}
{not sure|see title|see comments}
"""

"""What text in a language looks like: its letters, frequent characters and short words."""

from __future__ import annotations

from typing import NamedTuple

CHINESE = frozenset(
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所然家种事成方多经么去法"
    "学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实日军者意无力它与长把机十民第公此已工使情明性知全三又关点正业外"
    "将两高间由问很最重并物手应战向头文体政美相见被利什二等产或新己制身果加西斯月话合回特代内信表化老给世位次度门任常先海通教儿原东声提立"
    "及比员解水名真论处走义各入几口认条平系气题活尔更别打女变四神总何电数安少报才结反受目太量再感建务做接必场件计管期市直德资命山金指克许"
    "统区保至队形社便空决治展马科司五基眼书非则听白却界达光放强即像难且权思王象完设式色路记南品住告类求据程北边死张该交规万取拉格望觉术领"
    "共确传师观清今切院让识候带导争运字符输入删除选择错误值参数函返码缓存默认目录创建接"
    "這個們來為國說時會對於著過發後裡種經麼學現當沒動還進樣開從實軍無與長機關點業將兩間問並應戰頭體見產話內給門東聲員處義幾條氣題爾別變"
    "總電數報結務場計資許統區隊決馬書則聽卻達強難權設記類據張該規萬覺術領確傳師觀讓識帶導爭運輸刪選擇錯誤參碼緩認錄創"
)
JAPANESE_KANJI = frozenset(
    "日一国会人年大十二本中長出三同時政事自行社見月分議後前民生連五発間対上部東者党地合市業内相方四定今回新場金員九入選立開手米力学問高"
    "代明実円関決子動京全目表戦経通外最言氏現理調体化田当八六約主題下首意法不来作性的要用制治度務強気小七成期公野協取都和統以機平総加山思"
    "家話世受区領多県続進正安設保改数記院女初北午指権心界支第産結百派点教報済書府活原先共得解名交資予川向際査勝面委告軍文反元重近千考判認"
    "画海参売利組知案道信策集在件団別物側任引使求所次水半品昨論計死官増係感特情投示変打男基私各始島直両朝革価式確村提運終挙果西勢減台広容"
    "必応演電歳住争談能無再位置企真流格有口過局少放税検藤町常校料沢裁状工建語球営空職証土与急止送援供可役構木割聞身費付施切由説転食比難防"
    "補車優夫研収断井何南石足違消境神番規術護展態導鮮備宅害配副算視条幹独警宮究育席輸訪楽起万着乗店述残想線率病農州武声質念待試族象銀域助"
)
HANGUL = frozenset(
    "이다는을의에가고하지를로한은도기사으해어나리시아자라대서들일정그인수만보있전장부과여스주원성면제조구상적동중요와등오안개유용모국습니까"
    "것게할되된경분우진위생공연소신방세무미문비내년관실화내입실력없않습선발당때여행했었던데며면된까지야말음명계회물식간결청민러르드트크프"
    "터레테니마바저치표차초최추출통파필항현형호환활후찾변번본법복불삭쓰쓸양업예외웹잘접존지직처체추템특편포함합확않임타목록름값델색택권"
    "길각객갑강같건검격교군규금급남냐너넣노놓느능늘달더덮돌두디딩따또란람랜량려련렬령료류률링맞매메멤및발배백버범별뷰블빈빠빨"
)
CYRILLIC = {
    "Russian": ("абвгдеёжзийклмнопрстуфхцчшщъыьэюя", "оеаинтсрвлкмдпуыя"),
    "Ukrainian": ("абвгґдеєжзиіїйклмнопрстуфхцчшщьюя", "оаинвіетрслкдумпя"),
    "Bulgarian": ("абвгдежзийклмнопрстуфхцчшщъьюя", "аоеитнрсвлдкпъмуз"),
    "Belarusian": ("абвгдеёжзійклмнопрстуўфхцчшыьэюя", "анаіеыроцсдктлвуя"),
    "Serbian": ("абвгдђежзијклљмнњопрстћуфхцчџш", "аоиенрјтсукдвлпмз"),
    "Macedonian": ("абвгдѓежзѕијклљмнњопрстќуфхцчџш", "аоиетнрсвлдкпмујз"),
}
GREEK = ("αβγδεζηθικλμνξοπρσςτυφχψωάέήίόύώϊϋΐΰ", "αοιετσνηυρπκμλςίό")
HEBREW = ("אבגדהוזחטיךכלםמןנסעףפץצקרשת" + "".join(map(chr, range(0x05B0, 0x05C8))), "יוהלאמרתבשנ")
ARABIC = ("ابتثجحخدذرزسشصضطظعغفقكلمنهويىةءآأؤإئًٌٍَُِّْـپچژگکی", "اليمنتروبعدسفةه")
THAI = ("".join(map(chr, [*range(0x0E01, 0x0E3B), *range(0x0E40, 0x0E5C)])), "านรอกเงมยลวดทสตะปบคหแจพชขใไ่้ัีิ็์ู")


class Latin(NamedTuple):
    """A language in Latin letters: those that are not ASCII, in lower case, and small words that are."""

    letters: str
    words: frozenset[str]


def _latin(letters: str, words: str) -> Latin:
    return Latin(letters, frozenset(words.split()))


LATIN = {
    "English": _latin("éèêëçñöüïáàâäóôúæœø", "the of and to in is that for it as was with be by on not are this from"),
    "German": _latin("äöüßéàè", "der die das und ist von zu den mit nicht ein eine des dem auf werden wird sich als"),
    "French": _latin("àâæçèéêëîïôœùûüÿ", "le la les de des et un une est pour que dans qui par sur pas en du au sont"),
    "Spanish": _latin("áéíñóúüºª", "el la los las de y en un una que es por para con del se no al como lo su si"),
    "Portuguese": _latin("áâãàçéêíóôõúüºª", "o a os as de e em um uma que para com do da no na se por dos mais ao"),
    "Italian": _latin("àèéìíîòóùú", "il la di e che in un una per non del della si sono con da le dei nel al gli lo"),
    "Catalan": _latin("àçèéíïòóúü·", "el la de i en un una que es per amb del els les no al com"),
    "Dutch": _latin("ëïéèöüáóêûà", "de het een en van in is dat op te voor met niet zijn aan door worden wordt als of"),
    "Swedish": _latin("åäöéàü", "och att en det som av den med om inte ett till har kan eller ska i"),
    "Danish": _latin("æøåéäöü", "og at en det som af den med er ikke et til har kan eller for i der de"),
    "Norwegian": _latin("æøåéòóôäöü", "og at en det som av den med er ikke et til har kan eller for i"),
    "Finnish": _latin("äöåšž", "ja on ei se ettei tai kun sen voi vain ole jos joka mutta ovat tulee"),
    "Icelandic": _latin("áðéíóúýþæö", "og er um ekki sem til af eru var hann en"),
    "Polish": _latin("ąćęłńóśźż", "i w na z do nie jest to o od lub przez dla po jako przy oraz przed ten jego za"),
    "Czech": _latin("áčďéěíňóřšťúůýž", "a je v na se z do s pro nebo jako po od ale pokud podle jeho by tak k o"),
    "Slovak": _latin("áäčďéíĺľňóôŕšťúýž", "a je v na sa z do s pre alebo ako po od ale podľa jeho by tak k o"),
    "Hungarian": _latin("áéíóöőúüű", "a az egy nem hogy meg van volt csak mint vagy ez azt ha el kell"),
    "Romanian": _latin("ăâîșțşţ", "de la a cu nu este pe sau din pentru un o care mai sunt al ale fi prin"),
    "Croatian": _latin("čćđšž", "i u je na se za da od su s ne ili kao iz koji do"),
    "Slovene": _latin("čšž", "in je v na se za da od so z ne ali kot iz ki do"),
    "Turkish": _latin("çğıöşüâîû", "ve bir bu da de ile olarak veya olan gibi daha sonra en ancak"),
    "Lithuanian": _latin("ąčęėįšųūž", "ir yra kad su ne tai iš kaip ar buvo bei gali turi nuo"),
    "Latvian": _latin("āčēģīķļņšūž", "un ir ar no kas par ka uz vai pie nav kā to"),
    "Estonian": _latin("äõöüšž", "ja on ei et see kui ka oli või mis ning"),
}
MARKS = frozenset("«»‹›“”„‘’‚–—…•·°§€£¥©®™¿¡№†‡±×÷µ²³\u00a0\u00ad")
"""Of a text in letters, beside them: punctuation, and signs that are usual."""
WIDE_MARKS = frozenset("，。、；：？！（）《》〈〉「」『』【】〔〕“”‘’…—·～　〜ー−－＝＋／％＊＠＃＆")
"""Of a Chinese, Japanese or Korean text."""

"""The words and sentences of the Chinese stories."""
# ruff: noqa: SIM905 -- word lists read better as one text

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from plots import Some, Thing

PEOPLE = (
    "小红 阿香 王芳 小兰 春花 玉梅 秋月 小雨 冬梅 阿娇 小燕 美珍 "
    "小明 阿福 李雷 大山 石头 天明 国强 小宝 阿牛 老张 铁柱 文生"
).split()  # the first half are women
JOBS = "面包师 磨面工 老师 水手 花匠 织布工 画家 陶匠".split()
PLACES = "磨坊 码头 集市 学堂 茶馆 竹林 菜园 书店 石桥 河边 灯塔 农场 渡口 果园 古庙 车站".split()
THINGS = "风筝 灯笼 钥匙 小鼓 地图 铃铛 书 帽子 围巾 雨伞 笛子 扇子 钟 镜子 球 戒指".split()
THING_MEASURES = "只 盏 把 面 张 个 本 顶 条 把 支 把 座 面 个 枚".split()
COLOURS = "红色 蓝色 绿色 黄色 白色 黑色 金色".split()
GOODS = "苹果 梨 鸡蛋 贝壳 核桃 邮票 铅笔 糖 橘子 蜡烛 纽扣 铜钱".split()
GOODS_MEASURES = "个 个 个 枚 颗 张 支 块 个 支 颗 枚".split()
BOXES = "盒子 篮子 抽屉 木箱 布袋 罐子 柜子 竹筐".split()
ANIMALS = "狐狸 猫头鹰 花猫 黄狗 山羊 野兔 鸭子 毛驴 乌鸦 刺猬 白马 青蛙".split()
ANIMAL_MEASURES = "只 只 只 条 只 只 只 头 只 只 匹 只".split()
NUMBERS = "零 一 两 三 四 五 六 七 八 九 十 十一 十二".split()

PHRASES: dict[str, tuple[str, ...]] = {
    "hero": (
        "从前有一位{J}，名叫{A}，住在{P}附近。",
        "{A}是一位{J}，家就在{P}旁边的小屋里。",
        "很久以前，{P}附近住着一位{J}，大家都叫{A_him}{A}。",
        "{P}旁边住着{A}，{A_he}是一位人人喜欢的{J}。",
    ),
    "day": (
        "那是冬天的一个早晨，屋顶上盖着白雪。",
        "那天阳光明媚，鸟儿在树上唱歌。",
        "那天风很大，天空灰蒙蒙的。",
        "雨下了一整夜，路上又湿又滑。",
        "那是夏末一个温暖的傍晚。",
        "那时候，路很长，夜很黑。",
    ),
    "owns": (
        "{A_he}有{T_a}，喜欢得不得了。",
        "{A_he}最心爱的东西是{T_a}。",
        "奶奶送给{A_him}{T_a}。",
    ),
    "hides": (
        "有一天，{A}在{P}把{T}放进了一个{K}里。",
        "早上，{A_he}带着{T}来到{P}，把它藏在一个{K}里。",
        "{A}怕小偷，就把{T}藏进了{P}的一个{K}里。",
    ),
    "goes": (
        "然后{A_he}到{P}去干活。",
        "接着，{A}走到{P}，那里有很多事要做。",
        "然后{A}去了{P}，一直待到傍晚。",
    ),
    "comes": (
        "{A_he}不在的时候，{B}来到了{P}。",
        "过了一会儿，{B}路过{P}。",
        "不久，{B}到了{P}，四处看了看。",
    ),
    "moves": (
        "{B}在{K}里发现了{T}，把它放到了一个{L}里。",
        "{B}打开{K}，拿出{T}，放进了一个{L}里。",
    ),
    "takes": (
        "{B}打开{K}，拿了{T}，带到{Q}去了。",
        "{B}看见{K}里的{T}，拿起来就跑到{Q}去了。",
    ),
    "leaves": (
        "{B}打开{K}，看了看{T}，又放回原处。",
        "{B}看见了{K}里的{T}，但是没有动它。",
    ),
    "returns": (
        "{A}回到{P}以后，开始找{T}。",
        "傍晚，{A}回到{P}来拿{T}。",
    ),
    "after_moves": (
        "{K}里已经没有了，最后{A_he}在{L}里找到了它。",
        "{K}是空的。{A}到处找，终于在{L}里找到了{T}。",
    ),
    "after_takes": (
        "{K}是空的。“我的{T_n}在哪里？”{A}喊道。",
        "东西不见了。后来{A_he}才听说，{B}把它带到{Q}去了。",
    ),
    "after_leaves": (
        "它还在{K}里，{A_he}很高兴。",
        "它就在{K}里，和{A_he}离开的时候一样。",
    ),
    "where_in_box": ("\n问：{T}现在在哪里？\n答：在{P}的{K}里。",),
    "where_with_other": ("\n问：{T}现在在哪里？\n答：在{Q}，{B}拿着它。",),
    "has": (
        "{A_he}有{N}。",
        "{A_he}家的桌子上放着{N}。",
        "起初{A_he}有{N}。",
    ),
    "finds": (
        "在{P}，{A_he}捡到了{N}。",
        "{A}走到{P}，在地上发现了{N}。",
    ),
    "buys": (
        "在{P}，{A_he}买了{N}。",
        "{A}来到{P}，又买了{N}。",
    ),
    "gives": (
        "在{P}，{A_he}遇见了{B}，送给{B_him}{N}。",
        "{B}在{P}等着，{A}给了{B_him}{N}。",
    ),
    "loses": (
        "去{P}的路上，{A_he}丢了{N}。",
        "在{P}，{A}掉了{N}，再也找不到了。",
    ),
    "now": (
        "现在{A_he}有{N}。",
        "这样一共是{N}。",
        "{A}数了数，现在有{N}。",
    ),
    "how_many": ("\n问：{A}有多少{N_m}{N_n}？\n答：{A}有{N}。",),
    "meeting": (
        "{A}、{B}和{C}在{P}见面。",
        "一天下午，{A}、{B}和{C}三个朋友一起坐在{P}。",
        "{A}和{B}正在{P}等着，{C}走了过来。",
    ),
    "brought": (
        "{A}有{T_a}。",
        "{A}带来了{T_a}。",
        "{A}手里拿着{T_a}。",
    ),
    "swap": (
        "{A}把{T}给了{B}，{B}把{U}给了{A_him}。",
        "然后，{A}用{T}换了{B}的{U}。",
        "“我的{T_n}给你，你的{U_n}给我。”{A}对{B}说，他们就这样换了。",
    ),
    "holds": (
        "现在{T}是{A}的了。",
        "{A}拿着{T}，心里很高兴。",
    ),
    "who_has": ("\n问：{T}现在在谁那里？\n答：{T}在{A}那里。",),
    "what_has": ("\n问：{A}现在有什么？\n答：{A}有{T_a}。",),
    "lost": (
        "有一天，{A_he}丢了{T}，就出门去找。",
        "一天早上，{A_he}的{T}不见了，{A_he}只好到处去找。",
    ),
    "meets": (
        "在{P}，{A_he}遇见了{X_a}。",
        "{A_he}来到{P}，那里有{X_a}。",
        "{A}走到{P}，看见了{X_a}。",
    ),
    "unseen": (
        "“你看见我的{T}了吗？”{A}问。“没有。”{X}说。",
        "{X}摇摇头说：“我不知道什么{T_n}。”",
        "“对不起，”{X}说，“我没有看见你的{T_n}。”",
    ),
    "seen": (
        "“你的{T_n}？”{X}说，“在{P}的{K}里。”",
        "“你到{P}去，看看那个{K}。”{X}说。",
    ),
    "arrives": (
        "{A}赶到{P}，打开{K}，找到了{T}。",
        "{A}谢过它，来到{P}，{T}果然在{K}里。",
    ),
    "whom_met": ("\n问：{A}在{P}遇见了谁？\n答：{A}在{P}遇见了{X}。",),
    "where_met": ("\n问：{A}在哪里遇见了{X}？\n答：{A}在{P}遇见了{X}。",),
    "where_found": ("\n问：{T}在哪里？\n答：在{P}的{K}里。",),
    "ill": (
        "{A_he}的朋友{B}生病了，只能躺在床上。",
        "有一天，{A}听说{B}生病了。",
    ),
    "birthday": (
        "{A_he}的朋友{B}快要过生日了。",
        "第二天就是{B}的生日。",
    ),
    "wish": (
        "“你最想要什么？”{A}问。“{T_a}。”{B}说。",
        "“我一直想要{T_a}。”{B}说。",
    ),
    "promise": (
        "“我一定送给你。”{A}说。",
        "“等到明天吧。”{A}笑着说。",
    ),
    "fetch": (
        "{A_he}去了{Q}，在那里买到了{T}。",
        "于是{A}一路走到{Q}，因为只有那里才有这样的{T_n}。",
    ),
    "bring": (
        "傍晚，{A_he}带着{T}回来了。",
        "第二天早上，{A}敲了敲门，说：“这是你的{T_n}。”",
    ),
    "thanks": (
        "{B}高兴得笑了起来，连声道谢。",
        "{B}高兴得说不出话来。",
        "“你真是我的好朋友。”{B}说。",
    ),
    "what_brought": ("\n问：{A}给{B}带来了什么？\n答：{A}给{B_him}带来了{T_a}。",),
    "where_fetched": ("\n问：{A}在哪里得到了{T}？\n答：{A}在{Q}得到了它。",),
    "shops": (
        "{A_he}去{P}买了{N}和{M}。",
        "在{P}，{A}买了{N}，还买了{M}。",
    ),
    "carries": (
        "{A_he}把东西都装进袋子，背回了家。",
        "回家的路上，{A_he}把它们数了一遍。",
    ),
    "sum": ("\n问：{A}一共买了多少件东西？\n答：{N_d} + {M_d} = {S_d}，一共{S_w}件。",),
}

SEPARATOR = ""


def person(role: str, index: int) -> dict[str, str]:
    """Return the name and the pronoun of a person."""
    he = "她" if index < len(PEOPLE) // 2 else "他"
    return {role: PEOPLE[index], f"{role}_he": he, f"{role}_him": he}


def thing(role: str, value: Thing) -> dict[str, str]:
    """Return a thing with its colour, bare and with its measure word."""
    noun = THINGS[value.noun]
    full = f"{COLOURS[value.colour]}的{noun}"
    return {role: full, f"{role}_n": noun, f"{role}_a": f"一{THING_MEASURES[value.noun]}{full}"}


def some(role: str, value: Some) -> dict[str, str]:
    """Return a number of goods with the measure word that their noun asks for."""
    noun, measure = GOODS[value.goods], GOODS_MEASURES[value.goods]
    return {
        role: f"{NUMBERS[value.count]}{measure}{noun}",
        f"{role}_n": noun,
        f"{role}_m": measure,
        f"{role}_d": str(value.count),
    }


def total(role: str, value: int) -> dict[str, str]:
    """Return a bare number in words and digits."""
    return {f"{role}_w": NUMBERS[value], f"{role}_d": str(value)}


def place(role: str, index: int) -> dict[str, str]:
    """Return a place."""
    return {role: PLACES[index]}


def job(role: str, index: int) -> dict[str, str]:
    """Return a trade."""
    return {role: JOBS[index]}


def box(role: str, index: int) -> dict[str, str]:
    """Return a container."""
    return {role: BOXES[index]}


def animal(role: str, index: int) -> dict[str, str]:
    """Return an animal, bare and with its measure word."""
    return {role: ANIMALS[index], f"{role}_a": f"一{ANIMAL_MEASURES[index]}{ANIMALS[index]}"}

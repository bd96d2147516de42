"""A LINE bot that says what you say. Needs line-bot-sdk, and in .env.local LINE_CHANNEL_SECRET and LINE_CHANNEL_ACCESS_TOKEN"""
from flask import abort
from linebot.v3 import WebhookHandler
from linebot.v3.exceptions import InvalidSignatureError
from linebot.v3.messaging import ApiClient, Configuration, MessagingApi, ReplyMessageRequest, TextMessage
from linebot.v3.webhooks import MessageEvent, TextMessageContent


def main(request, config):
    handler = WebhookHandler(config["LINE_CHANNEL_SECRET"])

    @handler.add(MessageEvent, message=TextMessageContent)
    def answer(event):
        with ApiClient(Configuration(access_token=config["LINE_CHANNEL_ACCESS_TOKEN"])) as client:
            MessagingApi(client).reply_message(ReplyMessageRequest(
                reply_token=event.reply_token, messages=[TextMessage(text=event.message.text)]))

    try:
        handler.handle(request.get_data(as_text=True), request.headers.get("X-Line-Signature", ""))
    except InvalidSignatureError:
        abort(400, "the signature is wrong")
    return "OK"

package esxisim

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"reflect"

	"github.com/vmware/govmomi/vim25/types"
	"github.com/vmware/govmomi/vim25/xml"

	"hikae/backup/esxisim/internal/hv"
)

// soapError is a fault with its text for people.
type soapError struct {
	fault types.BaseMethodFault
	text  string
}

func (e soapError) Error() string { return e.text }

const restrictedText = "Current license or ESXi version prohibits execution of the requested operation."

func restricted() error { return soapError{&types.RestrictedVersion{}, restrictedText} }

func notAuthenticated(this types.ManagedObjectReference) error {
	return soapError{
		&types.NotAuthenticated{NoPermission: types.NoPermission{Object: &this, PrivilegeId: "System.View"}},
		"The session is not authenticated.",
	}
}

func gone(ref types.ManagedObjectReference) error {
	return soapError{
		&types.ManagedObjectNotFound{Obj: ref},
		fmt.Sprintf("The object '%s:%s' has already been deleted or has not been completely created", ref.Type, ref.Value),
	}
}

func invalid(property string) error {
	return soapError{&types.InvalidArgument{InvalidProperty: property}, "A specified parameter was not correct: " + property}
}

func unsupported(what string) error {
	return soapError{&types.NotSupported{}, "The operation is not supported on the object: " + what}
}

// asFault turns any error into a fault of the vSphere API.
func (h *Host) asFault(err error) soapError {
	var s soapError
	if errors.As(err, &s) {
		return s
	}
	var e *hv.Error
	if !errors.As(err, &e) {
		return soapError{&types.SystemError{Reason: err.Error()}, "A general system error occurred: " + err.Error()}
	}
	name := h.hv.Path(e.Name)
	file := types.FileFault{File: name}
	is := func(kind error) bool { return errors.Is(err, kind) }
	switch {
	case is(hv.ErrNotFound):
		return soapError{&types.FileNotFound{FileFault: file}, "File " + name + " was not found"}
	case is(hv.ErrExists):
		return soapError{
			&types.FileAlreadyExists{FileFault: file},
			"Cannot complete the operation because the file or folder " + name + " already exists",
		}
	case is(hv.ErrGone):
		return soapError{&types.NotFound{}, "The object or item referred to could not be found."}
	case is(hv.ErrRegistered):
		return soapError{&types.AlreadyExists{Name: e.Name}, "The specified key, name, or identifier '" + e.Name + "' already exists."}
	case is(hv.ErrNoSpace):
		return soapError{
			&types.NoDiskSpace{FileFault: file, Datastore: h.hv.Datastore()},
			"There is not enough space on the file system for the selected operation: " + e.Text,
		}
	case is(hv.ErrLocked):
		return soapError{&types.FileLocked{FileFault: file}, "Unable to access file " + name + " since it is locked"}
	case is(hv.ErrPower):
		return soapError{&types.InvalidPowerState{}, "The attempted operation cannot be performed in the current state: " + e.Text}
	case is(hv.ErrCancelled):
		return soapError{&types.RequestCanceled{}, "The task was canceled by a user."}
	case is(hv.ErrBusy):
		return soapError{&types.TaskInProgress{}, "The operation is not allowed in the current state: " + e.Text}
	case is(hv.ErrUnsupported):
		return soapError{&types.NotSupported{}, e.Text}
	case is(hv.ErrPath):
		return soapError{&types.InvalidDatastorePath{DatastorePath: e.Name}, e.Text}
	case is(hv.ErrTracking):
		return soapError{&types.FileFault{File: name}, "Error caused by file " + name + ": " + e.Text}
	}
	return soapError{&types.InvalidArgument{InvalidProperty: e.Name}, "A specified parameter was not correct: " + e.Name + " (" + e.Text + ")"}
}

type envelope struct {
	XMLName xml.Name `xml:"soapenv:Envelope"`
	Enc     string   `xml:"xmlns:soapenc,attr"`
	Env     string   `xml:"xmlns:soapenv,attr"`
	XSD     string   `xml:"xmlns:xsd,attr"`
	XSI     string   `xml:"xmlns:xsi,attr"`
	Body    body     `xml:"soapenv:Body"`
}

// body encodes its value as an element of a name that depends on the call.
type body struct {
	name  xml.Name
	value any
}

func (b body) MarshalXML(e *xml.Encoder, start xml.StartElement) error {
	if err := e.EncodeToken(start); err != nil {
		return err
	}
	if err := e.EncodeElement(b.value, xml.StartElement{Name: b.name}); err != nil {
		return err
	}
	return e.EncodeToken(start.End())
}

type faultBody struct {
	Code   string `xml:"faultcode"`
	String string `xml:"faultstring"`
	Detail struct {
		Fault faultDetail
	} `xml:"detail"`
}

// faultDetail encodes a fault as an element named after its type.
type faultDetail struct{ fault types.BaseMethodFault }

func (d faultDetail) MarshalXML(e *xml.Encoder, start xml.StartElement) error {
	kind := reflect.TypeOf(d.fault).Elem().Name()
	start.Name.Local = kind + "Fault"
	start.Attr = append(start.Attr,
		xml.Attr{Name: xml.Name{Local: "xmlns"}, Value: "urn:vim25"},
		xml.Attr{Name: xml.Name{Local: "xsi:type"}, Value: kind})
	return e.EncodeElement(d.fault, start)
}

func encode(b body) ([]byte, error) {
	var out bytes.Buffer
	out.WriteString(xml.Header)
	err := xml.NewEncoder(&out).Encode(&envelope{
		Enc: "http://schemas.xmlsoap.org/soap/encoding/", Env: "http://schemas.xmlsoap.org/soap/envelope/",
		XSD: "http://www.w3.org/2001/XMLSchema", XSI: "http://www.w3.org/2001/XMLSchema-instance", Body: b,
	})
	return out.Bytes(), err
}

// answer writes a method's result: res is a pointer to its Response type.
func (h *Host) answer(w http.ResponseWriter, method string, res any) {
	h.send(w, http.StatusOK, body{xml.Name{Space: "urn:vim25", Local: method + "Response"}, res})
}

// fail writes a fault.
func (h *Host) fail(w http.ResponseWriter, err error) {
	s := h.asFault(err)
	f := faultBody{Code: "ServerFaultCode", String: s.text}
	f.Detail.Fault.fault = s.fault
	h.send(w, http.StatusInternalServerError, body{xml.Name{Local: "soapenv:Fault"}, f})
}

func (h *Host) send(w http.ResponseWriter, status int, b body) {
	data, err := encode(b)
	if err != nil {
		h.log.Error("cannot encode an answer", "err", err)
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "text/xml; charset=utf-8")
	w.WriteHeader(status)
	w.Write(data)
}
